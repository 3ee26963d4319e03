"""Triton kernels for attention of one token per sequence over the cached tokens."""

import torch

from folio import device
from folio.inference.decode_kernels import MULTIPROCESSORS
from folio.inference.fixed_point import MARK
from folio.inference.handover import launch_options

if device.can_compile():
    import triton
    from triton import language as tl

    from folio.inference.fixed_point import add
    from folio.inference.half_precision import to_fp32
    from folio.inference.handover import let_next_start, wait

_PRODUCT_WARPS = 8  # of a program that also computes a product
_LOG2_E = 1.4426950408889634  # exp(x) is 2 ** (x * _LOG2_E)
_ROWS = 128  # of the product, per program; twice as many if there would be too many programs


def _block(threads: int, key_bytes: int, head_dim: int, size: int) -> int:
    """The number of tokens in a block, of which two are loaded at once.

    Each thread gets `key_bytes` bytes of its keys, fewer if a head has less than 64 channels.
    """
    return threads * key_bytes // (size * max(64, head_dim))


def attend(
    qkv: torch.Tensor, keys_values: torch.Tensor, positions: torch.Tensor, y: torch.Tensor
) -> None:
    """Append keys and values to the cache, and attend to all tokens up to positions[b].

    qkv [B, 3 C]; keys_values [2, B, n_head, T, D] is the cache of a layer; the result is y [B, C].
    The tokens of a head are split over the warps of one program. Several multiprocessors would have
    to wait for each other, which takes more time than it saves within GPT-2's context.
    """
    _, B, n_head, T, D = keys_values.shape
    # More warps for a program that has a multiprocessor for itself.
    warps = 4 if B * n_head > MULTIPROCESSORS else 16
    _attend[(B * n_head,)](
        qkv, keys_values, positions, y, _LOG2_E * D**-0.5, T, B * n_head * T * D,
        n_head=n_head, head_dim=D, block=_block(32 * warps, 64, D, keys_values.element_size()),
        num_warps=warps, **launch_options(qkv)
    )  # fmt: skip


def attend_and_project(
    qkv: torch.Tensor,
    keys_values: torch.Tensor,
    positions: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    x: torch.Tensor,
    y: torch.Tensor,
) -> None:
    """Add to y, which is 0: x, bias, and weight [C, C] times the result of `attend`.

    x and y [B, C + MARK] are residual streams in fixed point (fixed_point.py). A program multiplies
    a head's part of the result by _ROWS rows of the weight. The programs of the same head all
    repeat its attention, which takes less time than starting another kernel.
    """
    _, B, n_head, T, D = keys_values.shape
    C = n_head * D
    rows = min(_ROWS, triton.next_power_of_2(C))
    rows *= 2 if B * n_head * triton.cdiv(C, rows) > 2 * MULTIPROCESSORS else 1
    slices = triton.cdiv(C, rows)
    # A program that has a multiprocessor for itself can use all registers.
    key_bytes = 64 if B * n_head * slices > MULTIPROCESSORS else 128
    _attend_and_project[(B * n_head, slices)](
        qkv, keys_values, positions, weight, bias, x, y, _LOG2_E * D**-0.5, T, B * n_head * T * D,
        n_head=n_head, head_dim=D, rows=rows, mark=MARK, num_warps=_PRODUCT_WARPS,
        block=_block(32 * _PRODUCT_WARPS, key_bytes, D, keys_values.element_size()),
        **launch_options(qkv)
    )  # fmt: skip


if device.can_compile():

    @triton.jit
    def _load(keys, offset, start, end, head_dim: tl.constexpr, block: tl.constexpr):
        """The keys and the values of the tokens from `start` on that are before `end`."""
        t = start + tl.arange(0, block)
        place = keys + t[:, None] * head_dim + tl.arange(0, head_dim)[None, :]
        inside = (t < end)[:, None]
        return tl.load(place, inside, other=0.0), tl.load(place + offset, inside, other=0.0)

    @triton.jit
    def _scores(k, q, start, end, block: tl.constexpr):
        inside = start + tl.arange(0, block) < end
        return tl.where(inside, tl.sum(to_fp32(k) * q[None, :], 1), float("-inf"))

    @triton.jit
    def _merge(k0, v0, k1, v1, q, start, end, top, norm, total, block: tl.constexpr):
        """Update the maximum of the scores, and the sums of the powers of two and of the values
        with these weights, by two blocks of tokens."""
        score0 = _scores(k0, q, start, end, block)
        score1 = _scores(k1, q, start + block, end, block)
        higher = tl.maximum(top, tl.max(tl.maximum(score0, score1), 0))
        w0, w1, factor = tl.exp2(score0 - higher), tl.exp2(score1 - higher), tl.exp2(top - higher)
        values = w0[:, None] * to_fp32(v0) + w1[:, None] * to_fp32(v1)
        norm = norm * factor + tl.sum(w0 + w1, 0)
        return higher, norm, total * factor + tl.sum(values, 0)

    @triton.jit
    def _attention(
        own, keys, offset, end, scale, stores, channels: tl.constexpr, head_dim: tl.constexpr,
        block: tl.constexpr, early: tl.constexpr,
    ):  # fmt: skip
        """The attention [D] of the token `end`, whose q, k and v are at `own`, at intervals of
        `channels`. Earlier tokens' are in the cache, where k and v are stored if `stores`.

        `end` and the cache are read before `wait`: the graph of a token is launched after those of
        earlier tokens have ended.
        """
        d = tl.arange(0, head_dim)
        k0, v0 = _load(keys, offset, 0, end, head_dim, block)
        k1, v1 = _load(keys, offset, block, end, head_dim, block)
        wait(early)
        own += d
        q = tl.load(own).to(tl.float32) * scale
        k = tl.load(own + channels).to(keys.dtype.element_ty)
        v = tl.load(own + 2 * channels).to(keys.dtype.element_ty)
        tl.store(keys + end * head_dim + d, k, (d < head_dim) & stores)
        tl.store(keys + offset + end * head_dim + d, v, (d < head_dim) & stores)
        # Start with the token itself, then add the cached ones, two blocks at a time.
        top, norm, total = tl.sum(q * k.to(tl.float32), 0), 1.0, v.to(tl.float32)
        top, norm, total = _merge(k0, v0, k1, v1, q, 0, end, top, norm, total, block)
        for start in range(2 * block, end, 2 * block):
            k0, v0 = _load(keys, offset, start, end, head_dim, block)
            k1, v1 = _load(keys, offset, start + block, end, head_dim, block)
            top, norm, total = _merge(k0, v0, k1, v1, q, start, end, top, norm, total, block)
        return total / norm

    @triton.jit
    def _attend(
        qkv, keys_values, positions, y, scale, context, offset,
        n_head: tl.constexpr, head_dim: tl.constexpr, block: tl.constexpr, early: tl.constexpr,
    ):  # fmt: skip
        let_next_start(early)
        program = tl.program_id(0)
        b, channels = program // n_head, n_head * head_dim
        keys = keys_values + program.to(tl.int64) * context * head_dim
        end = tl.load(positions + b).to(tl.int32)
        own = qkv + (b * 3 * n_head + program % n_head) * head_dim
        result = _attention(
            own, keys, offset, end, scale, True, channels, head_dim, block, early
        )  # fmt: skip
        place = y + program * head_dim + tl.arange(0, head_dim)
        tl.store(place, result.to(y.dtype.element_ty))

    @triton.jit
    def _attend_and_project(
        qkv, keys_values, positions, weight, bias, x, y, scale, context, offset,
        n_head: tl.constexpr, head_dim: tl.constexpr, block: tl.constexpr, rows: tl.constexpr,
        mark: tl.constexpr, early: tl.constexpr,
    ):  # fmt: skip
        let_next_start(early)
        program, slice = tl.program_id(0), tl.program_id(1)
        channels: tl.constexpr = n_head * head_dim
        b, head = program // n_head, program % n_head
        keys = keys_values + program.to(tl.int64) * context * head_dim
        end = tl.load(positions + b).to(tl.int32)
        n, d = slice * rows + tl.arange(0, rows), head * head_dim + tl.arange(0, head_dim)
        inside = n < channels
        w = tl.load(weight + n[:, None] * channels + d[None, :], inside[:, None], other=0.0)
        is_first = inside & (head == 0)
        shift = tl.load(bias + n, is_first, other=0.0).to(tl.float32)
        own = qkv + (b * 3 * n_head + head) * head_dim
        result = _attention(
            own, keys, offset, end, scale, slice == 0, channels, head_dim, block, early
        )  # fmt: skip
        row = b * (channels + mark)
        before = tl.load(x + row + n, is_first, other=0)
        share = tl.sum(to_fp32(w) * result[None, :], 1) + shift
        add(y + row, n, share, before, inside, channels)
