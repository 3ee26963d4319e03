"""The blocks' fused passes on a GPU agree with autograd, and repeat their bits."""

import copy

import pytest
import torch
from torch.nn import functional as F

from folio import device
from folio.gpt.fused import column_sums, gelu, gradients, layer_norm
from folio.gpt.fused.blocks import FusedBlocks
from folio.gpt.fused.side_stream import SideStream
from folio.gpt.model import GPT, ModelParams

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")

CUDA = torch.device("cuda")
SMALL, LARGE = (8, 128, 6, 384), (2, 1024, 12, 768)  # B, T, n_head, C
HALF = [torch.bfloat16, torch.float16]
ROWS = [1, 37, 1024, 1025, 2112, 2113, 9_001]  # up to 2112, a program reads its rows at once


def blocks(size, dtype, dropout=0.0, checkpointing=False):
    """A model in fp32 whose weights are exact in half precision, and its fused blocks there."""
    _, T, n_head, C = size
    torch.manual_seed(1)
    model = GPT(ModelParams(n_layer=3, n_head=n_head, n_embd=C, block_size=T, dropout=dropout), 97)
    for p in model.parameters():
        p.data = (p.data + 0.02 * torch.randn_like(p)).to(CUDA, dtype).float()
    half = copy.deepcopy(model).to(dtype)
    half.gradient_checkpointing = checkpointing
    return model.to(CUDA), FusedBlocks(half)


# Three blocks per stack; two and one, if the model is SMALL; one.
@pytest.fixture(params=[gradients.MAX_STACKED, 26 << 20, 0], ids=["3", "2 of SMALL", "1"])
def stacked(request, monkeypatch):
    monkeypatch.setattr(gradients, "MAX_STACKED", request.param)


def embeddings(size, dtype, number=0):
    """Embeddings [B, T, C], and a gradient of the result."""
    B, T, _, C = size
    g = torch.Generator(CUDA).manual_seed(number)
    return torch.randn(2, B, T, C, device=CUDA, generator=g).to(dtype)


def passes(fused, x, d, seed=3):
    device.seed_step(seed, 0, CUDA)
    found = fused.forward(x), fused.backward(d)
    fused.join()
    return found


def results(fused, x, d):
    """Copies of the result, the gradient of x, and those of the parameters."""
    with device.deterministic(True):
        found = passes(fused, x, d)
    return [t.clone() for t in (*found, *parameter_gradients(fused.model))]


def parameter_gradients(model):
    return [
        p.grad for p in (*model.transformer.h.parameters(), *model.transformer.ln_f.parameters())
    ]


def autograd(model, x, d):
    x = x.clone().requires_grad_()
    hidden = model._run_blocks(x)
    hidden.backward(d)
    return [hidden.detach(), x.grad, *parameter_gradients(model)]


def distance(found, expected):
    return ((found.double() - expected.double()).norm() / expected.double().norm()).item()


@pytest.mark.usefixtures("stacked")
@pytest.mark.parametrize("size", [SMALL, LARGE], ids=["small", "large"])
@pytest.mark.parametrize("dtype", HALF)
def test_fused_passes_are_as_exact_as_autograd_in_half_precision(size, dtype):
    model, fused = blocks(size, dtype)
    x, d = embeddings(size, dtype)
    expected = autograd(model, x.float(), d.float())
    plain = autograd(copy.deepcopy(fused.model), x, d)
    found = results(fused, x, d)
    assert len(found) == 2 + 3 * 12 + 2
    for ours, theirs, right in zip(found, plain, expected, strict=True):
        assert distance(ours, right) < 1.3 * distance(theirs, right)


@pytest.mark.usefixtures("stacked")
@pytest.mark.parametrize("size", [SMALL, LARGE], ids=["small", "large"])
@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_fused_passes_repeat_their_bits_with_and_without_checkpointing(size, dropout):
    x, d = embeddings(size, torch.bfloat16)
    _, fused = blocks(size, torch.bfloat16, dropout)
    _, checkpointed = blocks(size, torch.bfloat16, dropout, checkpointing=True)
    first = results(fused, x, d)
    for again in (fused, fused, checkpointed, checkpointed):
        for found, expected in zip(results(again, x, d), first, strict=True):
            assert torch.equal(found, expected)


@pytest.mark.usefixtures("stacked")
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_captured_fused_passes_equal_plain_ones(dropout, checkpointing):
    _, plain = blocks(SMALL, torch.bfloat16, dropout, checkpointing)
    _, captured = blocks(SMALL, torch.bfloat16, dropout, checkpointing)

    def work(x, d):
        found = captured.forward(x), captured.backward(d)
        captured.join()
        return found

    with device.deterministic(True):
        replay = device.capture(work, *embeddings(SMALL, torch.bfloat16))
    for number in range(1, 5):
        inputs = embeddings(SMALL, torch.bfloat16, number)
        device.seed_step(3, 0, CUDA)
        found = [*replay(*inputs), *parameter_gradients(captured.model)]
        for ours, expected in zip(found, results(plain, *inputs), strict=True):
            assert torch.equal(ours, expected)


@pytest.mark.usefixtures("stacked")
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_a_late_second_stream_changes_no_bit(monkeypatch, dropout, checkpointing):
    _, fused = blocks(SMALL, torch.bfloat16, dropout, checkpointing)
    given = embeddings(SMALL, torch.bfloat16)
    expected, run = results(fused, *given), SideStream.run

    def run_late(side, work, *arguments):
        run(side, torch.cuda._sleep, 1 << 22)  # cycles: longer than a pass
        run(side, work, *arguments)

    monkeypatch.setattr(SideStream, "run", run_late)
    for _ in range(2):  # the second pass uses the memory of the first one
        for found, right in zip(results(fused, *given), expected, strict=True):
            assert torch.equal(found, right)


def test_dropout_of_fused_passes_depends_on_the_seed_and_scales_what_it_keeps():
    x, d = embeddings(SMALL, torch.bfloat16)
    _, fused = blocks(SMALL, torch.bfloat16, dropout=0.1)
    assert not torch.equal(passes(fused, x, d, 3)[0], passes(fused, x, d, 4)[0])
    ones, weight = torch.ones(5_000, 768, device=CUDA), torch.ones(768, device=CUDA)
    seeds = torch.tensor([5, 6], device=CUDA)
    total = [
        layer_norm.add_norm(0 * ones, ones, weight, weight, 0.1, seed).sum
        for seed in (seeds[:1], seeds[1:])
    ]
    for found in total:
        assert found.unique().tolist() == pytest.approx([0, 1 / 0.9])
        assert found.mean().item() == pytest.approx(1, abs=2e-3)
        assert (found.mean(0) - 1).abs().max() < 0.025 and (found.mean(1) - 1).abs().max() < 0.07
    both = (total[0] > 0) & (total[1] > 0)
    assert both.float().mean().item() == pytest.approx(0.81, abs=2e-3)


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("columns", [384, 768])
@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_add_norm_and_its_gradients_agree_with_autograd(rows, columns, dropout):
    g = torch.Generator(CUDA).manual_seed(rows)
    x, y, d_sum, d_normed = torch.randn(4, rows, columns, device=CUDA, generator=g).bfloat16()
    weight, bias = torch.randn(2, columns, device=CUDA, generator=g).bfloat16()
    options = (dropout, torch.tensor([8, 9], device=CUDA)[1:])
    result = layer_norm.add_norm(x, y, weight, bias, *options)
    mask = layer_norm.add_norm(0 * x.float(), 0 * x.float() + 1, weight, bias, *options).sum
    exact = [t.double().requires_grad_() for t in (x, y, weight, bias)]
    total = exact[0] + mask.double() * exact[1]
    normed = F.layer_norm(total, (columns,), *exact[2:])
    expected = torch.autograd.grad((normed, total), exact, (d_normed.double(), d_sum.double()))
    partials = torch.empty(column_sums.partial_count(rows), 3 * columns, device=CUDA)
    found = layer_norm.add_norm_backward(d_normed, d_sum, result, weight, partials, *options)
    sums = torch.empty(3 * columns, device=CUDA)
    column_sums.add_partials(partials[None], sums[None])
    assert distance(result.sum, total) < 3e-3 and distance(result.normed, normed) < 4e-3
    for ours, right in zip(found, expected[:2], strict=True):
        assert distance(ours, right) < 4e-3
    for ours, right in zip(sums.split(columns), (*expected[2:], expected[1].sum(0)), strict=True):
        assert distance(ours, right) < 4e-3


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("columns", [1152, 1536, 3072])
def test_gelu_and_column_sums_agree_with_pytorch(rows, columns):
    g = torch.Generator(CUDA).manual_seed(rows)
    x, d = torch.randn(2, rows, columns, device=CUDA, generator=g).bfloat16()
    x = 3 * x
    x[0, :4] = torch.tensor([80.0, -80.0, 0.0, -1e4])
    exact = x.double().requires_grad_()
    expected = F.gelu(exact, approximate="tanh")
    slope = torch.autograd.grad(expected, exact, d.double())[0]
    partials = torch.empty(2, column_sums.partial_count(rows), columns, device=CUDA)
    sums = torch.empty(2, columns, device=CUDA, dtype=torch.bfloat16)
    column_sums.column_sums(d[None], partials[:1])
    found, gradient = gelu.gelu(x), d.clone()
    gelu.gelu_backward_(gradient, x, partials[1])
    column_sums.add_partials(partials, sums)
    right = (expected, slope, d.double().sum(0), slope.sum(0))
    for ours, theirs in zip((found, gradient, *sums), right, strict=True):
        assert ours.isfinite().all() and distance(ours, theirs) < 4e-3
