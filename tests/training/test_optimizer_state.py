"""The state of any optimizer survives a checkpoint: its tensors, counters and nested structures."""

import collections
import copy

import numpy as np
import pytest
import torch

from folio.errors import UserError
from folio.training import checkpoint, optimizer_state, optimizers
from folio.training.checkpoint import Checkpoint


class Unusual(torch.optim.Optimizer):
    """SGD with all kinds of state: counters, nested tensors of other dtypes, strings, odd keys,
    one tensor in two places, complex views, running values in a group."""

    def __init__(self, params):
        super().__init__(params, {"lr": 0.1, "seen": 0, "scales": (1.0, 0.5), "average": None})

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            group["seen"] += 1
            group["average"] = torch.tensor(group["seen"] / 2)
            for p in group["params"]:
                state = self.state[p]
                state.setdefault("count", torch.zeros((), dtype=torch.int64)).add_(2**40 + 1)
                state.setdefault("past", []).append({"norm": p.grad.norm(), "note": None})
                state["factors"] = (torch.eye(2) * group["seen"], 0.25)
                state["half"] = p.grad.to(torch.bfloat16)
                state["phase"] = "warm-up é"
                state["nested"] = [{"precise": p.grad.double() / 3, "phase": ("a", state["half"])}]
                state["a.b"], state["a"] = p.grad + 1, {"b": p.grad + 2, "b.": p.grad + 3}
                state[0], state["0"], state[None] = p.grad + 4, p.grad + 5, {True: p.grad + 6}
                state["complex"] = torch.complex(p.grad, p.grad + 1).conj()
                state["negative"] = state["complex"].imag
                del state["complex"]  # "negative" is a view of what was there
                state["conjugate"] = torch.complex(p.grad, p.grad + 1).conj()
                state["even"], state["odd"] = torch.arange(8.0).chunk(2)
                state.setdefault("sum", torch.zeros_like(p)).add_(p.grad)
                state.setdefault("same sum", [state["sum"]])
                p -= group["lr"] * p.grad * float(state["past"][0]["norm"])
                p -= group["lr"] * state["same sum"][0]
            self.state["all"] = {"steps": torch.tensor(group["seen"]), "": [group["average"]]}


class Holding(torch.optim.Optimizer):
    """An optimizer whose first update creates the state `make(p)` for its first parameter p."""

    def __init__(self, params, make):
        super().__init__(params, {"lr": 0.1})
        self.make = make

    def step(self):
        p = self.param_groups[0]["params"][0]
        self.state[p] = self.make(p)


KINDS = {
    "adamw": lambda model: optimizers.adamw(model.parameters(), 0.1, (0.9, 0.95)),
    "sgd": lambda model: torch.optim.SGD(model.parameters(), lr=0.1),
    "momentum": lambda model: torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9),
    "adafactor": lambda model: torch.optim.Adafactor(model.parameters(), lr=0.1),
    "asgd": lambda model: torch.optim.ASGD(model.parameters(), lr=0.1),
    "nadam": lambda model: torch.optim.NAdam(model.parameters(), lr=0.1),
    "rmsprop": lambda model: torch.optim.RMSprop(
        model.parameters(), lr=0.1, momentum=0.9, centered=True
    ),
    "rprop": lambda model: torch.optim.Rprop(model.parameters(), lr=0.1),
    "muon": lambda model: torch.optim.Muon([*model.parameters()][::2], lr=0.1),
    "adagrad": lambda model: torch.optim.Adagrad(model.parameters(), lr=0.1),
    "unusual": lambda model: Unusual(model.parameters()),
    "groups": lambda model: torch.optim.Adam(
        [{"params": [p], "lr_scale": 0.5} for p in model.parameters()], lr=0.1
    ),
}


def network():
    torch.manual_seed(1)
    return torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Linear(4, 2))


def advance(model, optimizer, steps):
    for step in steps:
        x = torch.randn(5, 3, generator=torch.Generator().manual_seed(step))
        optimizer.zero_grad()
        model(x).square().sum().backward()
        optimizer.step()


def assert_same(value, other):
    assert type(value) is type(other)
    if isinstance(value, torch.Tensor):
        assert value.dtype == other.dtype and torch.equal(value, other)
    elif isinstance(value, dict):
        assert value.keys() == other.keys()
        for key in value:
            assert_same(value[key], other[key])
    elif isinstance(value, list | tuple):
        for pair in zip(value, other, strict=True):
            assert_same(*pair)
    else:
        assert value == other


@pytest.mark.filterwarnings("ignore:Casting complex values to real")  # undone after the cast
@pytest.mark.parametrize("make", KINDS.values(), ids=list(KINDS))
def test_optimizer_resumes_bit_for_bit_from_a_checkpoint(make, tmp_path):
    model = network()
    optimizer = make(model)
    advance(model, optimizer, range(3))
    tensors, rest = optimizer_state.save(optimizer)
    checkpoint.save(tmp_path, Checkpoint(3, tensors, {"optimizer": rest}))
    resumed_model = copy.deepcopy(model)
    resumed = make(resumed_model)
    found = checkpoint.load(tmp_path, 3)
    optimizer_state.restore(resumed, found.tensors, found.state["optimizer"])
    assert_same(resumed.state_dict(), optimizer.state_dict())
    for each, its_optimizer in ((model, optimizer), (resumed_model, resumed)):
        advance(each, its_optimizer, range(3, 6))
    assert_same(resumed.state_dict(), optimizer.state_dict())
    for p, other in zip(model.parameters(), resumed_model.parameters(), strict=True):
        assert torch.equal(p, other)


def test_optimizer_state_without_steps_is_restored():
    model = network()
    tensors, rest = optimizer_state.save(optimizers.adamw(model.parameters(), 0.1, (0.9, 0.95)))
    assert tensors == {}
    optimizer_state.restore(optimizers.adamw(model.parameters(), 0.1, (0.9, 0.95)), tensors, rest)


def deep(levels):
    value = []
    for _ in range(levels):
        value = [value]
    return value


def endless():
    value = []
    value.append({"again": value})
    return value


def overlapping(p):
    buffer = torch.zeros(9)
    return {"x": buffer, "y": [buffer[3:5]]}


Pair = collections.namedtuple("Pair", "a b")
UNSUPPORTED = {
    "object": (lambda p: {"x": object()}, "state[0]['x'] has type object"),
    "deque": (lambda p: {"x": [1, collections.deque()]}, "state[0]['x'][1] has type deque"),
    "ordered": (lambda p: {"x": collections.OrderedDict()}, "state[0]['x'] has type OrderedDict"),
    "namedtuple": (lambda p: {"x": Pair(1, 2)}, "state[0]['x'] has type Pair"),
    "numpy": (lambda p: {"x": np.float64(1)}, "state[0]['x'] has type float64"),
    "parameter": (lambda p: {"x": p}, "state[0]['x'] has type Parameter"),
    "complex128": (lambda p: {"x": p.detach().to(torch.complex128)}, "has dtype torch.complex128"),
    "sparse": (lambda p: {"x": p.detach().to_sparse()}, "state[0]['x'] is not a dense tensor"),
    "meta": (lambda p: {"x": p.detach().to("meta")}, "state[0]['x'] is on the device meta"),
    "gradient": (lambda p: {"x": p * 2}, "state[0]['x'] requires a gradient"),
    "overlap": (overlapping, "state[0]['x'] shares memory with state[0]['y'][0]"),
    "weights": (lambda p: {"x": p.detach()}, "shares memory with "),
    "tuple key": (lambda p: {"x": {(0, 1): 2}}, "state[0]['x'] has a key of type tuple"),
    "deep": (lambda p: {"x": deep(300)}, "is nested more than 50 levels deep"),
    "endless": (lambda p: {"x": endless()}, "is nested more than 50 levels deep"),
}


@pytest.mark.parametrize(("make", "problem"), UNSUPPORTED.values(), ids=list(UNSUPPORTED))
def test_unsupported_optimizer_state_is_rejected_in_one_line(make, problem):
    optimizer = Holding(network().parameters(), make)
    optimizer.step()
    with pytest.raises(UserError) as error:
        optimizer_state.save(optimizer)
    assert "the optimizer Holding: " in str(error.value) and problem in str(error.value)
    assert str(error.value).isprintable() and len(str(error.value)) < 300


def test_unsupported_option_of_a_group_is_rejected():
    optimizer = Unusual(network().parameters())
    optimizer.param_groups[0]["average"] = object()
    with pytest.raises(UserError, match=r"param_groups\[0\]\['average'\] has type object"):
        optimizer_state.save(optimizer)


def test_optimizer_state_may_have_45_levels(tmp_path):
    optimizer = Holding(network().parameters(), lambda p: {"x": deep(45)})
    optimizer.step()
    tensors, rest = optimizer_state.save(optimizer)
    checkpoint.save(tmp_path, Checkpoint(1, tensors, {"optimizer": rest}))
    found = checkpoint.load(tmp_path, 1)
    resumed = Holding(network().parameters(), None)
    optimizer_state.restore(resumed, found.tensors, found.state["optimizer"])
    assert_same(resumed.state_dict(), optimizer.state_dict())


@pytest.mark.filterwarnings("ignore:Casting complex values to real")
def test_tensor_in_two_places_is_saved_once_and_restored_as_one():
    model = network()
    optimizer = Unusual(model.parameters())
    advance(model, optimizer, range(1))
    tensors, rest = optimizer_state.save(optimizer)
    resumed = Unusual(network().parameters())
    optimizer_state.restore(resumed, tensors, rest)
    assert resumed.state["all"][""][0] is resumed.param_groups[0]["average"]
    for state in (resumed.state[p] for p in resumed.param_groups[0]["params"]):
        assert state["sum"] is state["same sum"][0]
        assert state["sum"] is not state["half"]
