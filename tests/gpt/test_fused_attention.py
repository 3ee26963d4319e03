"""Fused attention on a GPU: values and gradients match plain code, and repeat bit for bit."""

import pytest
import torch

from folio import device
from folio.gpt.fused import attention
from folio.gpt.fused.attention import Tile

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")

CUDA = torch.device("cuda")
LIMITS = {torch.bfloat16: 0.02, torch.float16: 0.004}  # relative errors
HEADS = 3
LENGTHS = (1, 17, 64, 100, 128, 129, 200, 256, 1024)
WAYS = [(None, None), (Tile(64, 64, 4, 2), Tile(128, 64, 8, 2))]  # forward and backward tiles


def tensors(length, size, dtype, heads=HEADS, batch=2):
    """qkv and the gradient of the output."""
    torch.manual_seed(1)
    shapes = (batch, length, 3 * heads * size), (batch, length, heads * size)
    return [torch.randn(shape, device=CUDA).to(dtype) for shape in shapes]


def seed(number):
    return torch.tensor([number], device=CUDA)


def dropout_mask(length, size, dropout, number, heads=HEADS, batch=2):
    """What attend keeps, [batch, heads, T, T]: its outputs for equal scores and unit values."""
    parts = []
    for start in range(0, length, size):
        q, k, v = qkv = torch.zeros(3, batch, length, heads, size, device=CUDA, dtype=torch.float16)
        count = min(size, length - start)
        v[:, start : start + count, :, :count] = torch.eye(count, device=CUDA)[:, None]
        qkv = torch.stack([q, k, v], 2).flatten(2)
        out, _ = attention.attend(qkv, heads, dropout, seed(number))
        parts.append(out.view(batch, length, heads, size)[..., :count] > 0)
    return torch.cat(parts, -1).transpose(1, 2)


def reference(qkv, d_out, mask, dropout, heads=HEADS):
    """The output and the gradient in fp32."""
    B, T, _ = qkv.shape
    qkv = qkv.float().requires_grad_()
    q, k, v = qkv.view(B, T, 3, heads, -1).permute(2, 0, 3, 1, 4)
    future = torch.ones(T, T, device=CUDA, dtype=torch.bool).triu(1)
    scores = (q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5).masked_fill(future, float("-inf"))
    p = scores.softmax(-1) if mask is None else scores.softmax(-1) * mask / (1 - dropout)
    out = (p @ v).transpose(1, 2).reshape(B, T, -1)
    return out.detach(), torch.autograd.grad(out, qkv, d_out.float())[0]


def attend(qkv, d_out, dropout, seed, ways=(None, None), heads=HEADS):
    out, logsumexp = attention.attend(qkv, heads, dropout, seed, tile=ways[0])
    arguments = (d_out, qkv, out, logsumexp, heads, dropout, seed)
    return out, attention.attend_backward(*arguments, tile=ways[1])


def relative_error(x, expected):
    return ((x.float() - expected).norm() / expected.norm()).item()


CASES = [
    *[(length, 64, torch.bfloat16, p) for length in LENGTHS for p in (0.0, 0.25)],
    *[(length, 64, torch.float16, 0.0) for length in (200, 1024)],
    *[(length, size, torch.bfloat16, 0.25) for length in (100, 256) for size in (16, 32, 128)],
]


@pytest.mark.parametrize(("length", "size", "dtype", "dropout"), CASES, ids=str)
def test_attention_matches_fp32(length, size, dtype, dropout):
    qkv, d_out = tensors(length, size, dtype)
    mask = dropout_mask(length, size, dropout, 5) if dropout else None
    expected_out, expected_gradient = reference(qkv, d_out, mask, dropout)
    for ways in WAYS if size == 64 else WAYS[:1]:
        out, gradient = attend(qkv, d_out, dropout, seed(5), ways)
        assert relative_error(out, expected_out) < LIMITS[dtype]
        assert relative_error(gradient, expected_gradient) < LIMITS[dtype]
        if length > 1:  # of a single token, the gradients of q and k are 0
            for part, expected in zip(
                gradient.chunk(3, -1), expected_gradient.chunk(3, -1), strict=True
            ):
                assert relative_error(part, expected) < LIMITS[dtype]


@pytest.mark.parametrize("ways", WAYS)
@pytest.mark.parametrize(("length", "batch"), [(128, 8), (1000, 4), (1024, 4)])
def test_attention_repeats_bit_for_bit(length, batch, ways):
    qkv, d_out = tensors(length, 64, torch.bfloat16, heads=12, batch=batch)
    first = attend(qkv, d_out, 0.1, seed(3), ways, heads=12)
    for _ in range(5):
        torch.randn(1 << 26, device=CUDA)  # other contents of the cache and of free memory
        again = attend(qkv, d_out, 0.1, seed(3), ways, heads=12)
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


def test_dropout_mask_is_random_in_heads_positions_and_seeds():
    length, dropout = 256, 0.2
    lower = torch.ones(length, length, device=CUDA, dtype=torch.bool).tril()
    masks = [dropout_mask(length, 64, dropout, number)[..., lower].double() for number in (1, 2)]
    masks = torch.stack(masks).flatten(0, 2)  # [seeds and heads, positions]
    deviation = (dropout * (1 - dropout) / masks.shape[1]) ** 0.5
    assert (masks.mean(1) - (1 - dropout)).abs().max() < 5 * deviation
    correlations = torch.corrcoef(masks).fill_diagonal_(0.0)
    assert correlations.abs().max() < 5 * masks.shape[1] ** -0.5


def test_neighbours_in_dropout_mask_are_independent():
    mask = dropout_mask(256, 64, 0.5, 7)[:, :, 128:, :128].double()
    for a, b in (
        (mask[..., 1:], mask[..., :-1]),
        (mask[..., 8:], mask[..., :-8]),  # the halves of a hash
        (mask[..., 1:, :], mask[..., :-1, :]),
        (mask[..., 1:, 1:], mask[..., :-1, :-1]),
    ):
        correlation = torch.corrcoef(torch.stack([a.flatten(), b.flatten()]))[0, 1]
        assert abs(correlation) < 5 * a.numel() ** -0.5


@pytest.mark.parametrize("length", [128, 512])
def test_captured_attention_follows_its_inputs(length):
    qkv, d_out = tensors(length, 64, torch.bfloat16)

    def work(qkv, d_out, seed):
        return attend(qkv, d_out, 0.1, seed)

    captured = device.capture(work, qkv, d_out, seed(1))
    for number, inputs in ((2, (qkv, d_out)), (3, (qkv * 0.5, -d_out))):
        expected = work(*inputs, seed(number))
        found = captured(*inputs, seed(number))
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize(
    ("n_embd", "n_head", "dtype", "expected"),
    [
        (768, 12, torch.bfloat16, True),
        (384, 6, torch.float16, True),
        (768, 12, torch.float32, False),
        (96, 2, torch.bfloat16, False),  # 48 channels per head
        (16, 2, torch.bfloat16, False),
        (1024, 4, torch.bfloat16, False),
    ],
)
def test_supported_sizes(n_embd, n_head, dtype, expected):
    assert attention.supports(n_embd, n_head, dtype) == expected
