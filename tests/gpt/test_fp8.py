"""The head's products in fp8, as PyTorch computes them on a CPU. (Kernels: test_cuda_fp8.py.)"""

import copy

import numpy as np
import pytest
import torch

from folio.gpt import cross_entropy_kernel
from folio.gpt.cross_entropy_kernel import FP8_FACTOR
from folio.gpt.fused import fp8
from folio.gpt.fused.head import FusedHead
from folio.gpt.model import GPT, ModelParams

ROWS, WIDTH, TOKENS = 997, 64, 80


def apart(ours, theirs):
    """The distance of two tensors relative to the length of the second one."""
    return ((ours.double() - theirs.double()).norm() / theirs.double().norm()).item()


def gpt(shared):
    torch.manual_seed(1)
    multiplicity = np.ones(ROWS)
    multiplicity[-1] = 50
    params = ModelParams(n_layer=1, n_head=2, n_embd=WIDTH, block_size=32, dropout=0.0)
    model = GPT(params, ROWS, multiplicity if shared else None)
    model.unseen_probability, model.distill_weight = 0.02, 0.4
    with torch.no_grad():
        model.transformer.wte.weight.mul_(5)
    return model.bfloat16()


@pytest.mark.parametrize("size", [1e-6, 1.0, 1e4])
def test_quantized_tensor_times_its_scale_is_the_tensor(size):
    x = size * torch.randn(48, 32)
    scale, rows = torch.empty(()), torch.empty(48, 32, dtype=torch.float8_e4m3fn)
    columns = torch.empty(32, 48, dtype=torch.float8_e4m3fn)
    fp8.quantize(x, scale, rows, columns)
    assert rows.float().abs().max() == 448 and torch.equal(columns.float(), rows.float().T)
    large = x.abs() > x.abs().max() / 2**14  # 448 is 2^15 times the least number of full precision
    off = (scale * rows.float() - x).abs()
    assert (off <= x.abs() / 16 * 1.001)[large].all() and apart(scale * rows.float(), x) < 0.04


def test_quantized_zeros_are_zeros():
    scale, rows = torch.empty(()), torch.empty(4, 4, dtype=torch.float8_e4m3fn)
    fp8.quantize(torch.zeros(4, 4), scale, rows)
    assert (scale * rows.float() == 0).all()


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_head_in_fp8_finds_a_value_that_is_not_finite(value):
    head, hidden = FusedHead(gpt(shared=False), fp8=True), torch.ones(TOKENS, WIDTH).bfloat16()
    hidden[1, 2] = value
    with torch.no_grad():
        loss, _ = head(hidden, torch.zeros(TOKENS, dtype=torch.long), 1.0, None)
    assert not loss.isfinite()


@pytest.mark.parametrize("soft", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("mixed", [False, True])
def test_gradient_in_fp8_is_that_of_the_logits(mixed, bias, soft):
    torch.manual_seed(2)
    logits = torch.nn.functional.pad(9 * torch.randn(TOKENS, ROWS), (0, -ROWS % 64))
    y, factor = torch.randint(ROWS, (TOKENS,)), torch.tensor(2.0**16 / TOKENS)
    constants = [3 * torch.rand(ROWS) if bias else None, y, factor]
    gradient = torch.full_like(logits, float("nan"), dtype=torch.float8_e5m2)
    if mixed:
        p = torch.randn(TOKENS, ROWS).softmax(1) if soft else None
        shares = 0.4 if soft else 0.0, 0.1
        cross_entropy_kernel.mixed_cross_entropy_(logits, ROWS, *constants, p, *shares, gradient)
    else:
        cross_entropy_kernel.cross_entropy_(logits, ROWS, *constants, gradient)
    expected = (logits * (FP8_FACTOR / factor)).to(gradient.dtype).float()
    torch.testing.assert_close(gradient.float(), expected, rtol=0.26, atol=2.0**-16)
    assert apart(gradient.float(), expected) < 1e-3 and expected.abs().max() <= FP8_FACTOR
    assert (gradient.float()[:, ROWS:] == 0).all()


@pytest.mark.parametrize("chunk", [16_384, 32])
@pytest.mark.parametrize("soft", [False, True])
@pytest.mark.parametrize("shared", [False, True])
def test_head_in_fp8_agrees_with_that_in_half_precision(monkeypatch, shared, soft, chunk):
    monkeypatch.setattr("folio.gpt.fused.head.GPU_CHUNK_ROWS", chunk)
    model = gpt(shared)
    heads = [FusedHead(copy.deepcopy(model), is_fp8) for is_fp8 in (False, True, True)]
    hidden = torch.randn(TOKENS, WIDTH).bfloat16()
    y = torch.randint(ROWS, (TOKENS,))
    p = torch.randn(TOKENS, ROWS).softmax(1).bfloat16() if soft else None
    with torch.no_grad():
        found = [(*head(hidden, y, 8.0, p), head.gradient) for head in heads]
    (loss, d_hidden, gradient), *in_fp8 = found
    assert all(torch.equal(*each) for each in zip(*in_fp8, strict=True))
    assert in_fp8[0][0].item() == pytest.approx(loss.item(), rel=2e-2)
    assert 0.001 < apart(in_fp8[0][1], d_hidden) < 0.08
    assert 0.001 < apart(in_fp8[0][2], gradient) < 0.08
