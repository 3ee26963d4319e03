"""What runs only on a GPU with fp8: kernels, steps and trainings whose head computes in fp8."""

import copy

import pytest
import torch
from test_cuda import CUDA, ROWS, advance, assert_equal, batches
from test_cuda_fused_step import HALF, advance_one, apart, gpt, mixed_targets, on_gpu, steps
from test_cuda_trainer import evaluate, trainer
from test_trainer import advance as advance_trainer
from test_trainer import metrics

from folio import device
from folio.errors import UserError
from folio.gpt.cross_entropy_kernel import mixed_cross_entropy_
from folio.gpt.fused import fp8
from folio.gpt.fused.passes import FusedPasses
from folio.training.weights import Weights

HAS_FP8 = torch.cuda.is_available() and torch.cuda.get_device_capability() >= (8, 9)
pytestmark = pytest.mark.skipif(not HAS_FP8, reason="there is no GPU with fp8")


def quantized(x):
    scale, rows = torch.empty((), device=x.device), torch.empty_like(x, dtype=torch.float8_e4m3fn)
    columns = torch.empty_like(x.T.contiguous(), dtype=torch.float8_e4m3fn)
    fp8.quantize(x, scale, rows, columns)
    return scale.cpu(), rows.cpu().float(), columns.cpu().float()


@pytest.mark.parametrize("shape", [(16, 16), (100, 48), (997, 768), (50_304, 768)])
@pytest.mark.parametrize(("_", "dtype"), HALF)
def test_kernel_of_quantize_agrees_with_pytorch(shape, dtype, _):
    x = torch.randn(shape).to(dtype)
    expected_scale, expected, _ = quantized(x)
    scale, rows, columns = quantized(x.to(CUDA))
    torch.testing.assert_close(scale, expected_scale, rtol=1e-6, atol=0)
    torch.testing.assert_close(rows, expected, rtol=0.126, atol=0.002)  # one number further, rarely
    assert (rows != expected).float().mean() < 1e-3 and torch.equal(columns, rows.T)


@pytest.mark.parametrize("soft", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("size", [50_257, 8_192, 997])
@pytest.mark.parametrize(("_", "dtype"), HALF)
def test_gradient_in_fp8_agrees_with_pytorch(size, dtype, bias, soft, _):
    logits, constants = mixed_targets(size, dtype, bias, soft)
    moved = on_gpu(constants)
    found, alone = [], logits.to(CUDA)
    for where, arguments in ((torch.device("cpu"), constants), (CUDA, moved)):
        there = logits.to(where, copy=True)
        gradient = torch.full_like(there, float("nan"), dtype=torch.float8_e5m2)
        mixed_cross_entropy_(there, size, *arguments, gradient)
        found.append(gradient.cpu().float())
    mixed_cross_entropy_(alone, size, *moved)
    torch.testing.assert_close(there, alone, rtol=8e-3, atol=1e-6)  # that in half precision
    torch.testing.assert_close(found[1], found[0], rtol=0.26, atol=2.0**-14)
    assert (found[1] != found[0]).float().mean() < 1e-2 and not found[1][:, size:].any()


@pytest.mark.parametrize("chunk", [16_384, 100])
@pytest.mark.parametrize("soft", [False, True])
@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize(("precision", "dtype"), HALF)
def test_loss_and_gradients_agree_with_half_precision(
    monkeypatch, precision, dtype, shared, soft, chunk
):
    monkeypatch.setattr("folio.gpt.fused.head.GPU_CHUNK_ROWS", chunk)
    model = Weights(gpt(shared=shared), precision).compute_model
    [(x, y)] = [(x.to(CUDA), y.to(CUDA)) for x, y in batches(1)[:1]]
    p = [torch.randn(x.numel(), ROWS, device=CUDA).softmax(1).to(dtype)] if soft else []
    found = []
    for is_fp8 in (False, True, True):
        passes, scale = FusedPasses(copied := copy.deepcopy(model), is_fp8), torch.tensor(8.0)
        with device.deterministic(True):
            loss = passes.loss_and_gradients(x, y, scale.to(CUDA), *p)
        found.append([loss, *(each.grad for each in copied.parameters())])
    for half, ours, again in zip(*found, strict=True):
        assert torch.equal(ours, again) and apart(ours, half) < 0.2
    assert found[1][0].item() == pytest.approx(found[0][0].item(), rel=5e-3)
    assert any(apart(ours, half) > 1e-3 for half, ours in zip(*found[:2], strict=True))


@pytest.mark.parametrize("train", [advance, advance_one])
@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_steps_repeat_their_bits_and_agree_with_half_precision(precision, train):
    ours, again, plain = (steps(precision, fp8_head=way) for way in (True, True, False))
    again.captures = False
    for step in (ours, again, plain):
        train(step, 0, 5)
    assert ours.captures and ours.read().steps == 5
    assert_equal(ours, again)
    assert ours.read().loss == pytest.approx(plain.read().loss, rel=1e-2)
    assert ours.read().norm == pytest.approx(plain.read().norm, rel=5e-2)
    assert ours.read() != plain.read()


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_step_that_is_not_finite_changes_nothing(precision):
    step = steps(precision, fp8_head=True)
    advance_one(step, 0, 2)
    with torch.no_grad():
        step.weights.model.transformer.ln_f.weight[0] = float("nan")
    step.load_state_dict({name: t.clone() for name, t in step.state_dict().items()})
    before = {name: t.clone() for name, t in step.weights.model.state_dict().items()}
    advance_one(step, 2, 4)
    assert step.read().problem == "loss" and step.read().steps == 2
    for name, tensor in step.weights.model.state_dict().items():
        torch.testing.assert_close(tensor, before[name], rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_training_resumes_bit_for_bit(tmp_path, precision):
    whole, stopped = (trainer(precision, fp8_head=True, accumulation=1) for _ in range(2))
    advance_trainer(whole, 6)
    advance_trainer(stopped, 3)
    stopped.save(tmp_path)
    resumed = trainer(precision, fp8_head=True, accumulation=1)
    resumed.resume(tmp_path)
    advance_trainer(resumed, 3)
    assert metrics(resumed) == metrics(whole) and evaluate(resumed) == evaluate(whole)
    for name, weight in whole.model.state_dict().items():
        assert torch.equal(weight, resumed.model.state_dict()[name]), name
    half = trainer(precision, accumulation=1)
    advance_trainer(half, 6)
    assert evaluate(whole) == pytest.approx(evaluate(half), rel=1e-2)
    assert evaluate(whole) != evaluate(half)


def test_refused_where_the_kernels_are_not_fused(monkeypatch):
    message = "train.fp8_head needs bf16 or fp16 on an NVIDIA GPU with fp8"
    with pytest.raises(UserError, match=message):
        trainer("fp32", fp8_head=True)
    with pytest.raises(UserError, match=f"{message}.* with 48 channels and 24 per head"):
        trainer(sizes={"n_layer": 2, "n_embd": 48}, fp8_head=True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (8, 0))
    with pytest.raises(UserError, match=message):
        trainer(fp8_head=True)
