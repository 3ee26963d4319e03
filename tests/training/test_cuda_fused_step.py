"""What runs only on a GPU: steps with the fused passes and the AdamW kernel match plain ones."""

import copy
from dataclasses import replace

import numpy as np
import pytest
import torch
from test_cuda import CUDA, ROWS, advance, assert_equal, batches, restore, state
from test_trainer import OPTIONS, TRAIN
from torch.nn import functional as F

from folio import device
from folio.gpt.cross_entropy_kernel import mixed_cross_entropy_
from folio.gpt.fused import embeddings
from folio.gpt.fused.passes import FusedPasses
from folio.gpt.model import GPT, ModelParams
from folio.tokens import vocabulary
from folio.training import adamw_kernel, optimizer_state, optimizers
from folio.training.adamw_kernel import AdamWKernel, Parameter
from folio.training.loss_scale import LossScale
from folio.training.step import TrainStep
from folio.training.teachers import Teachers
from folio.training.weights import ReplicatedWeights, Weights

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")

HALF = [("bf16", torch.bfloat16), ("fp16", torch.float16)]


def gpt(dropout=0.0, shared=True, checkpointing=False, width=64):
    """A model in which some tokens share the last row."""
    torch.manual_seed(1)
    multiplicity = np.ones(ROWS)
    multiplicity[-1] = 50
    params = ModelParams(n_layer=2, n_head=2, n_embd=width, block_size=32, dropout=dropout)
    model = GPT(params, ROWS, multiplicity if shared else None).to(CUDA)
    model.gradient_checkpointing = checkpointing
    model.unseen_probability, model.distill_weight = 0.02, 0.4
    return model


def steps(precision, fused=True, model=None, optimizer="adamw", **options):
    weights = Weights(model or gpt(), precision)
    train = replace(TRAIN, **(OPTIONS if optimizer == "muon" else {}))
    built = optimizers.build(weights, train, vocabulary.full_vocabulary(ROWS))
    step = TrainStep(weights, built, 1.0, fused=fused, **options)
    assert weights.fused == fused
    return step


def advance_one(step, first, last):
    """Train with one micro-batch per step, so that AdamW's update is direct."""
    for number in range(first, last):
        device.seed_step(7, number, CUDA)
        step(batches(number)[:1], learning_rate=1e-3 * (1 + number))


def apart(ours, theirs):
    """The distance of two tensors relative to the length of the second one."""
    return ((ours.float() - theirs.float()).norm() / theirs.float().norm()).item()


ADVANCE = [advance, advance_one]


@pytest.mark.parametrize("train", ADVANCE)
@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_fused_step_agrees_with_plain_step(precision, optimizer, train):
    fused, plain = (steps(precision, way, optimizer=optimizer) for way in (True, False))
    assert (fused._direct is not None) == (optimizer == "adamw") and plain._direct is None
    start = copy.deepcopy(fused.weights.model)
    for step in (fused, plain):
        train(step, 0, 5)
    assert fused.captures and fused.read().steps == plain.read().steps == 5
    assert fused.read().loss == pytest.approx(plain.read().loss, rel=2e-3)
    assert fused.read().norm == pytest.approx(plain.read().norm, rel=2e-2)
    before, ours, theirs = (
        torch.nn.utils.parameters_to_vector(model.parameters())
        for model in (start, fused.weights.model, plain.weights.model)
    )
    assert apart(ours - before, theirs - before) < 0.2
    for master, copied in zip(
        fused.weights.parameters, fused.weights.compute_model.parameters(), strict=True
    ):
        assert torch.equal(master.to(copied.dtype), copied)


@pytest.mark.parametrize("train", ADVANCE)
@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_captured_fused_step_repeats_the_bits_of_launched_kernels(precision, train):
    captured, again, launched = (steps(precision, model=gpt(dropout=0.1)) for _ in range(3))
    launched.captures = False
    for step in (captured, again, launched):
        train(step, 0, 5)
    assert_equal(captured, again)
    assert_equal(captured, launched)


@pytest.mark.parametrize("train", ADVANCE)
def test_gradient_checkpointing_is_captured_and_changes_no_bit(train):
    kept, recomputed = (
        steps("bf16", model=gpt(dropout=0.1, checkpointing=checkpointing))
        for checkpointing in (False, True)
    )
    assert recomputed.captures
    for step in (kept, recomputed):
        train(step, 0, 4)
    assert_equal(kept, recomputed)


@pytest.mark.parametrize("train", ADVANCE)
@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_resumed_fused_step_equals_uninterrupted_one(precision, train):
    whole, first = (steps(precision, model=gpt(dropout=0.1)) for _ in range(2))
    train(whole, 0, 8)
    train(first, 0, 5)
    tensors = {name: t.cpu().clone() for name, t in state(first).items()}
    _, rest = optimizer_state.save(first.optimizer)
    for second in (steps(precision, model=gpt(dropout=0.1)), first):  # a used graph is replaced
        restore(second, tensors, rest)
        train(second, 5, 8)
        assert_equal(second, whole)


def test_plain_step_resumes_a_fused_one():
    fused, plain = steps("bf16"), steps("bf16", fused=False)
    advance_one(fused, 0, 5)
    tensors = {name: t.cpu().clone() for name, t in state(fused).items()}
    restore(plain, tensors, optimizer_state.save(fused.optimizer)[1])
    assert state(plain).keys() == tensors.keys()
    for step in (fused, plain):
        step.reset()
        advance_one(step, 5, 6)
    assert fused.read().loss == pytest.approx(plain.read().loss, rel=2e-3)


@pytest.mark.parametrize("train", ADVANCE)
def test_overflow_in_fp16_skips_the_update_and_halves_the_scale(train):
    step = steps("fp16")
    step.scale.fill_(2.0**60)
    before = {name: t.clone() for name, t in step.weights.model.state_dict().items()}
    train(step, 0, 1)
    stats = step.read()
    assert (stats.steps, stats.norms, stats.problem) == (1, 0, None)
    assert step.scale.item() == 2.0**59
    assert all(torch.equal(t, before[name]) for name, t in step.weights.model.state_dict().items())
    step.scale.fill_(64.0)
    train(step, 1, 3)
    assert step.read().norms == 2 and step.updates.item() == 2
    assert {state["step"].item() for state in step.optimizer.state.values()} == {2}


@pytest.mark.parametrize("train", ADVANCE)
@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_fused_step_that_is_not_finite_changes_nothing(precision, train):
    step = steps(precision)
    train(step, 0, 2)
    with torch.no_grad():
        step.weights.model.transformer.ln_f.weight[0] = float("nan")
    step.load_state_dict({name: t.clone() for name, t in step.state_dict().items()})
    before = {name: t.clone() for name, t in state(step).items()}
    train(step, 2, 4)
    assert step.read().problem == "loss" and step.read().steps == 2
    for name, tensor in state(step).items():
        torch.testing.assert_close(tensor, before[name], rtol=0, atol=0, equal_nan=True)


def test_fused_step_of_replicated_weights_equals_that_of_one_process():
    class Alone:
        def sum_(self, tensor):
            return tensor

    weights = ReplicatedWeights(gpt(dropout=0.1), "bf16", Alone())
    optimizer = optimizers.build(weights, TRAIN, vocabulary.full_vocabulary(ROWS))
    usual, replicated = steps("bf16", model=gpt(dropout=0.1)), TrainStep(weights, optimizer, 1.0)
    assert weights.fused and replicated._direct is None
    for step in (usual, replicated):
        advance(step, 0, 4)  # with several micro-batches per step, neither update is direct
    assert_equal(usual, replicated)


def test_fused_step_with_noise_and_teachers_agrees_with_plain_step():
    teacher = Teachers([Weights(gpt().eval(), "bf16").compute_model])
    options = {"input_noise": 0.2, "teachers": teacher}
    fused, plain = (steps("bf16", way, **options) for way in (True, False))
    for step in (fused, plain):
        advance_one(step, 0, 5)
    assert fused.captures
    assert fused.read().loss == pytest.approx(plain.read().loss, rel=2e-3)
    assert fused.read().norm == pytest.approx(plain.read().norm, rel=2e-2)


@pytest.mark.parametrize("chunk", [16_384, 100])
@pytest.mark.parametrize("soft", [False, True])
@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize(("precision", "dtype"), HALF)
def test_loss_and_gradients_agree_with_autograd(monkeypatch, precision, dtype, shared, soft, chunk):
    monkeypatch.setattr("folio.gpt.fused.head.GPU_CHUNK_ROWS", chunk)
    plain = Weights(gpt(shared=shared), precision).compute_model
    fused = copy.deepcopy(plain)
    exact = copy.deepcopy(plain).cpu().double()
    [(x, y)] = [(x.to(CUDA), y.to(CUDA)) for x, y in batches(1)[:1]]
    p = torch.randn(x.numel(), ROWS, device=CUDA).softmax(1) if soft else None
    scale, passes = torch.tensor(8.0, device=CUDA), FusedPasses(fused)
    with device.deterministic(True):
        for _ in range(2):  # gradients are overwritten
            loss = passes.loss_and_gradients(x, y, scale, p if p is None else p.to(dtype))
    here = [t.cpu() for t in (x, y, scale)]
    expected = exact.loss(*here, *([p.to(dtype).double().cpu()] if soft else []))
    expected.backward()
    plain.loss(x, y, scale, *([p.to(dtype)] if soft else [])).backward()
    assert loss.item() == pytest.approx(expected.item(), rel=2e-3)
    parameters = (model.named_parameters() for model in (fused, plain, exact))
    for (name, ours), (_, theirs), (_, right) in zip(*parameters, strict=True):
        limit = 0.005 + 1.5 * apart(theirs.grad.cpu(), right.grad)
        assert apart(ours.grad.cpu(), right.grad) < limit, name


def mixed_targets(size, dtype, bias, soft):
    """Logits for mixed_cross_entropy_, and its arguments after `size`."""
    n, g = 50, torch.Generator().manual_seed(size)
    logits = F.pad(3 * torch.randn(n, size, generator=g), (0, -size % 64)).to(dtype)
    y = torch.randint(size, (n,), generator=g)
    y[:2] = torch.tensor([0, size - 1])
    constants = [3 * torch.rand(size, generator=g) if bias else None, y, torch.tensor(0.5)]
    constants += [torch.randn(n, size, generator=g).softmax(1).to(dtype) if soft else None]
    return logits, [*constants, 0.4 if soft else 0.0, 0.1]


def on_gpu(arguments):
    return [t.to(CUDA) if isinstance(t, torch.Tensor) else t for t in arguments]


@pytest.mark.parametrize("soft", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("size", [50_257, 8_192, 997])
@pytest.mark.parametrize(("_", "dtype"), HALF)
def test_kernel_of_mixed_targets_agrees_with_pytorch(size, dtype, bias, soft, _):
    logits, constants = mixed_targets(size, dtype, bias, soft)
    here, there = logits.float(), logits.to(CUDA)
    expected = mixed_cross_entropy_(here, size, *constants)
    losses = mixed_cross_entropy_(there, size, *on_gpu(constants))
    torch.testing.assert_close(losses.cpu(), expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(there.cpu().float(), here, rtol=8e-3, atol=1e-6)


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize(("windows", "width"), [(3, 64), (140, 64), (7, 96)])
@pytest.mark.parametrize("step", [1, 3, 30])  # from one occurrence of a token to its next
@pytest.mark.parametrize(("_", "dtype"), HALF)
def test_gradients_of_embeddings_agree_with_exact_sums(dtype, step, windows, width, dropout, _):
    model = gpt(dropout, width=width).to(dtype)
    fused = embeddings.FusedEmbeddings(model)
    ids = torch.randint(ROWS, (windows, 30), device=CUDA)
    ids[:, ::step] = 5
    shapes = [(windows, 30, width), (ROWS, width)]
    d_x, d_tokens = (torch.randn(shape, device=CUDA, dtype=dtype) for shape in shapes)
    with torch.no_grad():
        for weight in (model.transformer.wte.weight, model.transformer.wpe.weight):
            weight.fill_(1)
        kept = fused.forward(ids) != 0
        expected = d_tokens.double()
        rows = torch.where(kept, d_x.double() / (1 - dropout), 0)
        expected.index_add_(0, ids.flatten(), rows.flatten(0, 1))
        found = []
        for _ in range(2):
            found.append(d_tokens.clone())
            fused.backward(d_x.clone(), found[-1])
    assert torch.equal(*found)
    assert abs(kept.float().mean().item() - (1 - dropout)) < 0.05
    assert apart(found[0], expected) < (0.01 if dtype == torch.bfloat16 else 0.002)
    positions = torch.zeros(32, width, device=CUDA, dtype=torch.double)
    positions[:30] = rows.sum(0)
    gradient = model.transformer.wpe.weight.grad
    assert apart(gradient, positions) < 0.01 and not gradient[30:].any()


@pytest.mark.parametrize("windows", [4, 140])  # PyTorch sorts 4,200 ids by other kernels
def test_captured_gradients_of_embeddings_repeat_their_bits(windows):
    fused = embeddings.FusedEmbeddings(gpt().bfloat16())

    @torch.no_grad()
    def gradient(ids, d_x, d_tokens):
        fused.forward(ids)
        result = d_tokens.clone()
        fused.backward(d_x, result)
        return result

    first, other = torch.randint(ROWS, (2, windows, 30), device=CUDA)
    d_x, d_tokens = (
        torch.randn(*shape, 64, device=CUDA).bfloat16() for shape in ((windows, 30), (ROWS,))
    )
    captured = device.capture(gradient, first, d_x, d_tokens)
    for ids in (first, other):
        expected = gradient(ids, d_x, d_tokens)
        assert torch.equal(captured(ids, d_x, d_tokens), expected)


@pytest.mark.parametrize("offset", [0, 3], ids=["aligned", "not aligned"])
@pytest.mark.parametrize(("_", "dtype"), HALF)
def test_adamw_kernel_makes_the_updates_of_pytorch(dtype, offset, _):
    shapes = [(97, 64), (3 * adamw_kernel._CHUNK,), (5000,), (33, 7), (1,)]
    rates = [torch.full((), rate, device=CUDA) for rate in (1e-2, 2e-2)]

    def tensor(values, kind=torch.float32):
        return torch.empty(values.numel() + offset, dtype=kind, device=CUDA)[offset:].view_as(
            values
        )

    masters = [torch.nn.Parameter(torch.randn(shape, device=CUDA)) for shape in shapes]
    groups = [
        {"params": [p for p in masters if (p.dim() > 1) == matrix], "weight_decay": decay}
        for matrix, decay in ((True, 0.1), (False, 0.0))
    ]
    for group, rate in zip(groups, rates, strict=True):
        group["lr"] = rate
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95), fused=True, capturable=True)
    parameters = [
        Parameter(
            *(tensor(p).copy_(p.detach()), tensor(p).zero_(), tensor(p).zero_()),
            *(tensor(p, dtype), tensor(p, dtype), torch.zeros((), device=CUDA)),
            *(rates[p.dim() <= 1], 0.1 if p.dim() > 1 else 0.0),
        )
        for p in masters
    ]
    kernel = AdamWKernel(parameters, (0.9, 0.95), 1e-8)
    stats, scale, updates = torch.zeros(5, device=CUDA), torch.ones((), device=CUDA), rates[0] * 0
    loss_scale = LossScale(stats, scale, updates, 1.0, False, 1.0, 2000)
    for size in (1.0, 1e-3, 1e-3):  # the first gradient is clipped
        for p, ours in zip(masters, parameters, strict=True):
            ours.gradient.copy_(size * torch.randn_like(p))
            p.grad = ours.gradient.float()
        kernel(torch.ones((), device=CUDA), loss_scale)
        torch.nn.utils.clip_grad_norm_(masters, 1.0)
        optimizer.step()
    assert stats.tolist()[2:] == [3, 3, 0]
    for p, ours in zip(masters, parameters, strict=True):
        torch.testing.assert_close(ours.weight, p.detach(), rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(ours.exp_avg, optimizer.state[p]["exp_avg"])
        torch.testing.assert_close(ours.exp_avg_sq, optimizer.state[p]["exp_avg_sq"])
        assert torch.equal(ours.copy, ours.weight.to(dtype)) and ours.step.item() == 3
