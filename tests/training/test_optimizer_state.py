"""The state of any optimizer survives a checkpoint: its tensors, counters and nested structures."""

import copy

import pytest
import torch

from folio.training import checkpoint, optimizer_state, optimizers
from folio.training.checkpoint import Checkpoint


class Unusual(torch.optim.Optimizer):
    """SGD with all kinds of state: a counter, nested lists, a matrix, running values in a group."""

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
                p -= group["lr"] * p.grad * float(state["past"][0]["norm"])


KINDS = {
    "adamw": lambda model: optimizers.adamw(model, 0.1, (0.9, 0.95)),
    "sgd": lambda model: torch.optim.SGD(model.parameters(), lr=0.1),
    "momentum": lambda model: torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9),
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


@pytest.mark.parametrize("make", KINDS.values(), ids=list(KINDS))
def test_optimizer_resumes_bit_for_bit_from_a_checkpoint(make, tmp_path):
    model = network()
    optimizer = make(model)
    advance(model, optimizer, range(3))
    tensors, rest = optimizer_state.save(optimizer)
    checkpoint.save(tmp_path, Checkpoint(3, copy.deepcopy(tensors), {"optimizer": rest}))
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
    tensors, rest = optimizer_state.save(optimizers.adamw(model, 0.1, (0.9, 0.95)))
    assert tensors == {}
    optimizer_state.restore(optimizers.adamw(model, 0.1, (0.9, 0.95)), tensors, rest)


def test_optimizer_state_of_unknown_type_is_refused_by_name():
    optimizer = Unusual(network().parameters())
    optimizer.param_groups[0]["average"] = object()
    with pytest.raises(TypeError, match=r"state 1\.0\.average is of type object"):
        optimizer_state.save(optimizer)
