"""What runs only on a GPU: CUDA graphs, the Triton kernel and compiled blocks match plain code."""

import copy
import gc
import itertools
from dataclasses import replace

import numpy as np
import pytest
import torch
from test_trainer import OPTIONS, TRAIN
from torch.nn import functional as F

from folio import device
from folio.gpt import cross_entropy
from folio.gpt.model import GPT, ModelParams
from folio.inference import generation
from folio.tokens import vocabulary
from folio.tokens.batches import Batches
from folio.training import optimizer_state, optimizers
from folio.training.loss_scale import LossScale
from folio.training.step import TrainStep
from folio.training.teachers import Teachers
from folio.training.weights import Weights

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")

CUDA = torch.device("cuda")
PARAMS = ModelParams(n_layer=2, n_head=2, n_embd=64, block_size=32, dropout=0.1)
ROWS = 997


def gpt():
    torch.manual_seed(1)
    return GPT(PARAMS, ROWS).to(CUDA)


def steps(model, precision, way="plain"):
    """way: "plain" or "compiled", with AdamW; or "options" for every option of small texts, with
    plain passes, or "fused options". (test_cuda_fused_step.py has fused passes with AdamW.)"""
    if "options" in way:
        weights, known = Weights(model, precision), vocabulary.full_vocabulary(ROWS)
        optimizer = optimizers.build(weights, replace(TRAIN, **OPTIONS), known)
        teacher = Teachers([Weights(gpt().eval(), precision).compute_model])
        model.distill_weight = weights.compute_model.distill_weight = 0.5
        options = {"input_noise": 0.2, "teachers": teacher, "fused": way == "fused options"}
        step = TrainStep(weights, optimizer, 1.0, **options)
        assert weights.fused == options["fused"]
        return step
    return TrainStep(
        Weights(model, precision),
        optimizers.adamw(model.parameters(), 0.1, (0.9, 0.95)),
        1.0,
        compiled=way == "compiled",
        fused=False,
    )


def batches(number, count=2):
    """The micro-batches of a step."""
    g = torch.Generator().manual_seed(number)
    ids = torch.randint(ROWS, (count, 4, PARAMS.block_size + 1), generator=g)
    return [(part[:, :-1], part[:, 1:]) for part in ids]


def advance(step, first, last):
    for number in range(first, last):
        device.seed_step(7, number, CUDA)
        step(batches(number), learning_rate=1e-3 * (1 + number))


def state(step):
    """The tensors that the next step depends on."""
    optimizer, _ = optimizer_state.save(step.optimizer)
    parts = {
        "model": step.weights.model.state_dict(),
        "optimizer": optimizer,
        "step": step.state_dict(),
    }
    return {f"{part}.{name}": t for part, found in parts.items() for name, t in found.items()}


def restore(step, tensors, rest):
    """Put back what `state` returned; rest: the second value of optimizer_state.save."""
    parts = {"model": {}, "optimizer": {}, "step": {}}
    for name, tensor in tensors.items():
        part, _, own_name = name.partition(".")
        parts[part][own_name] = tensor
    step.weights.model.load_state_dict(parts["model"])
    optimizer_state.restore(step.optimizer, parts["optimizer"], rest)
    step.load_state_dict(parts["step"])


def assert_equal(step, other):
    assert step.read() == other.read()
    ours, theirs = state(step), state(other)
    assert ours.keys() == theirs.keys()
    assert [name for name in ours if not torch.equal(ours[name], theirs[name])] == []


WAYS = [(p, way) for p in ("bf16", "fp16") for way in ("plain", "compiled", "fused options")]
WAYS += [(p, "options") for p in ("bf16", "fp16", "fp32")] + [("fp32", "plain")]


@pytest.mark.parametrize(("precision", "way"), WAYS)
def test_captured_step_equals_plain_step(precision, way):
    captured, plain = (steps(gpt(), precision, way) for _ in range(2))
    plain.captures = False
    for step in (captured, plain):
        advance(step, 0, 5)
    assert captured.captures and captured.read().steps == 5
    assert_equal(captured, plain)


@pytest.mark.parametrize(("precision", "way"), WAYS)
def test_resumed_step_with_new_graph_equals_uninterrupted_one(precision, way):
    whole, first = (steps(gpt(), precision, way) for _ in range(2))
    advance(whole, 0, 8)
    advance(first, 0, 5)
    tensors = {name: t.cpu().clone() for name, t in state(first).items()}
    _, rest = optimizer_state.save(first.optimizer)
    for second in (steps(gpt(), precision, way), whole):  # a used graph is replaced
        if second is whole:
            expected = copy.deepcopy(state(whole))
        restore(second, tensors, rest)
        advance(second, 5, 8)
        if second is whole:
            assert all(torch.equal(expected[name], t) for name, t in state(whole).items())
        else:
            assert_equal(second, whole)


@pytest.mark.parametrize(("precision", "way"), WAYS)
def test_captured_step_that_is_not_finite_changes_nothing(precision, way):
    step = steps(gpt(), precision, way)
    advance(step, 0, 2)
    with torch.no_grad():
        step.weights.model.transformer.ln_f.weight[0] = float("nan")
    step.load_state_dict({name: t.clone() for name, t in step.state_dict().items()})
    before = {name: t.clone() for name, t in state(step).items()}
    advance(step, 2, 4)
    assert step.read().problem == "loss" and step.read().steps == 2
    for name, tensor in state(step).items():
        torch.testing.assert_close(tensor, before[name], rtol=0, atol=0, equal_nan=True)


def test_graph_works_after_an_earlier_one_is_gone():
    x = torch.randn(64, 1 << 16, device=CUDA).bfloat16()  # its product needs cuBLAS's workspace
    earlier, later = (device.capture(lambda x: x @ x.T, x) for _ in range(2))
    expected = later(x).clone()
    del earlier
    gc.collect()
    torch.cuda.empty_cache()
    others = torch.zeros(1 << 28, device=CUDA)
    assert torch.equal(later(x), expected) and not others.any()


class Counting(torch.optim.SGD):
    """SGD with state on the GPU and on the CPU."""

    def step(self):
        for group in self.param_groups:
            group["average"] = torch.ones((), device=CUDA)
            for p in group["params"]:
                self.state[p]["count"] = [torch.tensor(3), torch.tensor(4, device=CUDA)]
        self.state["all"] = {"norm": torch.ones(2, device=CUDA), "norms": torch.ones(2)}


def test_optimizer_state_is_restored_where_it_was():
    weight = torch.nn.Parameter(torch.ones(2, device=CUDA))
    optimizer, resumed = Counting([weight]), Counting([weight])
    optimizer.step()
    tensors, rest = optimizer_state.save(optimizer)
    optimizer_state.restore(resumed, {name: t.cpu() for name, t in tensors.items()}, rest)
    for each in (optimizer, resumed):
        found = [each.param_groups[0]["average"], *each.state[weight]["count"]]
        found += each.state["all"].values()
        assert [t.device.type for t in found] == ["cuda", "cpu", "cuda", "cuda", "cpu"]
        assert [t.tolist() for t in found] == [1.0, 3, 4, [1.0, 1.0], [1.0, 1.0]]


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_fused_adam_and_adamw_make_the_same_updates_as_plain_ones(precision):
    for kind in (torch.optim.Adam, torch.optim.AdamW):
        found = []
        for fused in (True, False):
            model = gpt()
            optimizer = kind(model.parameters(), eps=1.0, fused=fused)
            step = TrainStep(Weights(model, precision), optimizer, grad_clip=0.25)
            step.scale.fill_(2.0**60 if precision == "fp16" else 1.0)  # overflows
            advance(step, 0, 1)
            step.scale.clamp_(max=64.0)
            advance(step, 1, 3)
            found.append((step.optimizer_skips, step.read().steps, step.weights.model.state_dict()))
        assert [skips for skips, *_ in found] == [True, False]
        assert found[0][1] == found[1][1] == 3
        for name, tensor in found[0][2].items():
            torch.testing.assert_close(tensor, found[1][2][name], rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_compiled_step_agrees_with_plain_step(precision):
    torch.manual_seed(1)
    model = GPT(ModelParams(n_layer=2, n_head=2, n_embd=64, block_size=32, dropout=0.0), ROWS)
    compiled, plain = (
        steps(copy.deepcopy(model).to(CUDA), precision, way) for way in ("compiled", "plain")
    )
    for step in (compiled, plain):
        advance(step, 0, 1)
    assert compiled.read().loss == pytest.approx(plain.read().loss, rel=1e-3)
    assert compiled.read().norm == pytest.approx(plain.read().norm, rel=2e-2)


def test_step_is_compiled_as_one_graph():
    counted = torch._dynamo.utils.counters
    torch._dynamo.reset()
    counted.clear()
    advance(steps(gpt(), "bf16", "compiled"), 0, 2)
    assert counted["stats"]["unique_graphs"] == 1


def test_kernel_of_loss_scale_agrees_with_pytorch():
    infinity, nan = float("inf"), float("nan")
    for fp16, norm, loss, scale, updates, problem in itertools.product(
        *([False, True], [0.0, 3.0, 1e5, infinity, nan], [2.5, infinity, nan]),
        *([1.0, 2.0**-10, 2.0**16], [0.0, 1999.0], [0.0, 1.0, 2.0]),
    ):
        found = []
        for where in (torch.device("cpu"), CUDA):
            numbers = ([1.0, 2.0, 3.0, 4.0, problem], scale, updates, loss, norm)
            *tensors, loss_there, norm_there = (torch.tensor(x, device=where) for x in numbers)
            state = LossScale(*tensors, 1.5, fp16, 2.0**-10, 2000)
            divisor, skip = state.check_and_scale(loss_there, norm_there)
            divisor.masked_fill_(skip > 0, 0)  # of no use then
            found.append([*tensors[0].tolist(), *map(float, (*tensors[1:], divisor, skip))])
        assert found[1] == pytest.approx(found[0])


@pytest.mark.parametrize("bias", [False, True], ids=["plain", "bias"])
@pytest.mark.parametrize("size", [50_257, 4_096, 4_097, 997, 3])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_cross_entropy_kernel_agrees_with_pytorch(size, dtype, bias):
    n, g = 300, torch.Generator().manual_seed(size)
    x, weight = torch.randn(n, 64, generator=g), torch.randn(size, 64, generator=g)
    y = torch.randint(size, (n,), generator=g)
    bias = torch.randn(size, generator=g) if bias else None
    x, weight, y = x.to(CUDA, dtype), weight.to(CUDA, dtype), y.to(CUDA)
    bias = bias if bias is None else bias.to(CUDA)
    exact = [t.double().requires_grad_() for t in (x, weight)]
    logits = F.linear(*exact, bias if bias is None else bias.double())
    expected = F.cross_entropy(logits, y)
    ours = [t.clone().requires_grad_() for t in (x, weight)]
    loss = cross_entropy.linear_cross_entropy(*ours, bias, y)
    precise = dtype == torch.float32
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5 if precise else 1e-2)
    gradients = torch.autograd.grad(loss, ours), torch.autograd.grad(expected, exact)
    for found, right in zip(*gradients, strict=True):
        apart = (found.double() - right).norm() / right.norm()
        assert apart < (1e-5 if precise else 2e-2)


@pytest.mark.parametrize("share", [0.2, 0.0], ids=["on the GPU", "read ahead"])
@pytest.mark.parametrize("block_size", [8, 13])
@pytest.mark.parametrize("segmented", [False, True])
def test_batches_on_gpu_equal_those_on_cpu(monkeypatch, block_size, share, segmented):
    monkeypatch.setattr("folio.tokens.batches._MAX_SHARE", share)
    text = np.random.default_rng(0).integers(1 << 16, size=1_000, dtype=np.uint16)
    more = [text[::-1].copy(), text.repeat(2)] if segmented else []
    here, there = (
        Batches(text, block_size, 5, where, segmented=more) for where in (torch.device("cpu"), CUDA)
    )
    for first in (0, 4, 160, *range(4_000, 5_000, 4)):
        for cpu, gpu in zip(here.windows(first, 4), there.windows(first, 4), strict=True):
            assert gpu.is_cuda and torch.equal(cpu, gpu.cpu())


def test_batches_on_gpu_do_not_wait_for_earlier_work():
    text = np.random.default_rng(0).integers(1 << 16, size=1_000, dtype=np.uint16)
    here, there = (Batches(text, 8, 5, where) for where in (torch.device("cpu"), CUDA))
    sums = torch.zeros(20, dtype=torch.int64, device=CUDA)
    for _ in range(2):  # the second time, all kernels are loaded
        torch.cuda.synchronize()
        torch.cuda._sleep(1 << 30)
        for number in range(len(sums)):
            x, y = there.windows(4 * number, 4)
            sums[number] = (x - 2 * y).sum()  # later, when nothing refers to x and y
        there._stream.synchronize()
        is_asleep = not torch.cuda.current_stream().query()
    assert is_asleep
    expected = [here.windows(4 * number, 4) for number in range(len(sums))]
    assert sums.tolist() == [(x - 2 * y).sum().item() for x, y in expected]


@pytest.mark.parametrize("prompts", [1, 3])
def test_captured_generation_equals_uncached_one_beyond_context(prompts):
    model = gpt().eval()
    with torch.no_grad():
        for p in model.parameters():
            p += 0.3 * torch.randn_like(p)
    ids = torch.randint(ROWS, (prompts, 5), device=CUDA)
    found = torch.stack([*generation.generate_batch(model, ids, 60, 0.0, fused=False)], 1)
    text = ids
    with torch.no_grad():
        for _ in range(60):
            text = torch.cat(
                [text, model(text[:, -PARAMS.block_size :])[:, -1].argmax(-1)[:, None]], 1
            )
    assert torch.equal(found, text[:, 5:])


@pytest.mark.parametrize("precision", ["bf16", "fp32"])
def test_deterministic_step_repeats_its_bits_at_long_context(precision):
    torch.manual_seed(1)
    model = GPT(ModelParams(n_layer=2, n_head=2, n_embd=128, block_size=1024, dropout=0.0), ROWS)
    ids = torch.randint(ROWS, (4, 1025), device=CUDA)
    once, again = (steps(copy.deepcopy(model).to(CUDA), precision) for _ in range(2))
    for step in (once, again):
        for _ in range(3):
            step([(ids[:, :-1], ids[:, 1:])], learning_rate=1e-3)
    assert_equal(once, again)


@pytest.mark.parametrize("way", ["plain", "compiled"])
def test_gradient_checkpointing_changes_no_step(way):
    found = []
    for checkpointing in (False, True):
        model = gpt()
        model.gradient_checkpointing = checkpointing
        step = steps(model, "bf16", way)
        assert step.captures != checkpointing
        advance(step, 0, 4)
        found.append(step.read())
    assert found[1].loss == pytest.approx(found[0].loss, rel=1e-3 if way == "plain" else 2e-2)
    assert found[1].norm == pytest.approx(found[0].norm, rel=2e-2 if way == "plain" else 1e-1)
