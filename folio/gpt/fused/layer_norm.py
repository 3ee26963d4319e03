"""A residual addition with dropout and the layer norm after it, and their gradients.

Each is one kernel that reads its inputs from memory once. The backward pass computes the dropout
mask again, from the seed: Philox (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2,
3", with the 7 rounds that pass their tests) is a function of the seed and an element's number.

N is the number of tokens, C the number of channels, and P that of column_sums.py.
"""

from typing import NamedTuple

import torch

from folio import device
from folio.gpt.fused.column_sums import rows_at_once

if device.can_compile():
    import triton
    from triton import language as tl

_EPSILON = 1e-5  # nn.LayerNorm's
_STAGES = 3  # rounds of a program of the backward pass whose inputs are under way at once


class Normed(NamedTuple):
    """The results of add_norm."""

    sum: torch.Tensor  # x + dropout(y), [N, C]
    normed: torch.Tensor  # its layer norm, [N, C]
    mean: torch.Tensor  # [N] in fp32
    rstd: torch.Tensor  # 1 / standard deviation, [N] in fp32


def add_norm(
    x: torch.Tensor,
    y: torch.Tensor | None,
    weight: torch.Tensor,
    bias: torch.Tensor,
    dropout: float = 0.0,
    seed: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
) -> Normed:
    """Add dropout(y) to x and normalise the sum. x and y are [N, C], weight and bias [C].

    Without y, the sum is x. seed: one integer on the device, if there is dropout. out: memory for
    `normed`.
    """
    N, C = x.shape
    normed = torch.empty_like(x) if out is None else out
    total = x if y is None else torch.empty_like(x)
    mean, rstd = torch.empty(2, N, dtype=torch.float32, device=x.device)
    block = triton.next_power_of_2(C)
    _add_norm[(N,)](
        *(x, y, weight, bias, seed, total, normed, mean, rstd),
        width=C,
        epsilon=_EPSILON,
        dropout=0.0 if y is None else dropout,
        has_y=y is not None,
        block=block,
        num_warps=max(1, block // 1024),
    )
    return Normed(total, normed, mean, rstd)


def add_norm_backward(
    d_normed: torch.Tensor,
    d_sum: torch.Tensor | None,
    result: Normed,
    weight: torch.Tensor,
    partials: torch.Tensor,
    dropout: float = 0.0,
    seed: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The gradients of x and y [N, C] of add_norm; one and the same tensor if dropout is 0.

    d_normed and d_sum are the gradients of what add_norm returned; None: the sum has no other use.
    Writes partial sums of the gradients of weight and bias, and of the columns of the gradient of
    y, to partials [P, 3C] in fp32, whose rows are contiguous. out: memory for the gradient of y.
    """
    N, C = d_normed.shape
    dy = torch.empty_like(d_normed) if out is None else out
    dx = torch.empty_like(d_normed) if dropout else dy
    block = triton.next_power_of_2(C)
    rows, rounds = rows_at_once(N)
    _add_norm_backward[(len(partials),)](
        *(d_normed, d_sum, result.sum, result.mean, result.rstd, weight, seed, dx, dy, partials),
        *(N, partials.stride(0)),
        width=C,
        dropout=dropout,
        has_d_sum=d_sum is not None,
        rows=rows,
        block=block,
        stages=_STAGES if rounds > 1 else 1,
        num_warps=min(max(1, rows * block // 512), 16),  # 16 elements per thread
    )
    return dx, dy


if device.can_compile():

    @triton.jit
    def _dropout_factor(seed, row, dropout: tl.constexpr, rows: tl.constexpr, block: tl.constexpr):
        """0 with probability `dropout`, otherwise 1 / (1 - dropout): [rows, block], from a row on.

        Philox returns four numbers at once, which are for four adjacent columns.
        """
        counter = row * (block // 4) + tl.arange(0, rows * block // 4)
        a, b, c, d = tl.randint4x(seed, counter, n_rounds=7)
        bits = tl.join(tl.join(a, b), tl.join(c, d)).reshape(rows, block)
        kept = (bits.to(tl.uint32, bitcast=True) >> 8) >= int(dropout * 2**24)
        return tl.where(kept, 1.0 / (1.0 - dropout), 0.0)

    @triton.jit(do_not_specialize_on_alignment=["seed"])
    def _add_norm(
        x,
        y,
        weight,
        bias,
        seed,
        total,
        normed,
        mean,
        rstd,
        width: tl.constexpr,
        epsilon: tl.constexpr,
        dropout: tl.constexpr,
        has_y: tl.constexpr,
        block: tl.constexpr,
    ):
        row = tl.program_id(0)
        column = tl.arange(0, block)
        inside = column < width
        offset = row.to(tl.int64) * width + column
        value = tl.load(x + offset, inside, other=0.0).to(tl.float32)
        if has_y:
            added = tl.load(y + offset, inside, other=0.0).to(tl.float32)
            if dropout > 0:
                added *= _dropout_factor(tl.load(seed), row, dropout, 1, block).reshape(block)
            stored = (value + added).to(total.dtype.element_ty)
            tl.store(total + offset, stored, inside)
            value = stored.to(tl.float32)  # the backward pass has no other
        scale = tl.load(weight + column, inside, other=0.0).to(tl.float32)
        shift = tl.load(bias + column, inside, other=0.0).to(tl.float32)
        average = tl.sum(value, 0) / width
        centred = tl.where(inside, value - average, 0.0)
        inverse = tl.rsqrt(tl.sum(centred * centred, 0) / width + epsilon)
        result = centred * inverse * scale + shift
        tl.store(normed + offset, result.to(normed.dtype.element_ty), inside)
        tl.store(mean + row, average)
        tl.store(rstd + row, inverse)

    @triton.jit
    def _add_pairs(a, b, c, d):
        return a + c, b + d

    @triton.jit
    def _rows_backward(
        d_normed,
        d_sum,
        total,
        mean,
        rstd,
        weight,
        seed,
        dx,
        dy,
        start,
        length,
        width: tl.constexpr,
        dropout: tl.constexpr,
        has_d_sum: tl.constexpr,
        rows: tl.constexpr,
        block: tl.constexpr,
        once: tl.constexpr,
    ):
        """Write dx and dy of some rows, from row `start` on.

        Returns [block] in fp32 each: what these rows add to the gradients of weight, bias and y.
        once: whether these are all the rows of a program. If not, `weight` [block] is loaded, in
        fp32, and otherwise it is loaded here: to wait for it first would take twice as long.
        """
        row = tl.arange(0, rows)
        column = tl.arange(0, block)
        exists = row < length - start
        mask = exists[:, None] & (column < width)[None, :]
        offset = tl.cast(start, tl.int64) * width + row[:, None] * width + column[None, :]
        above = tl.load(d_normed + offset, mask, other=0.0).to(tl.float32)
        value = tl.load(total + offset, mask, other=0.0).to(tl.float32)
        if has_d_sum:
            beside = tl.load(d_sum + offset, mask, other=0.0).to(tl.float32)
        average = tl.load(mean + start + row, exists, other=0.0)[:, None]
        inverse = tl.load(rstd + start + row, exists, other=0.0)[:, None]
        if once:
            weight = tl.load(weight + column, column < width, other=0.0).to(tl.float32)
        if dropout > 0:  # while the loads are under way
            factor = _dropout_factor(seed, start, dropout, rows, block)
        normal = value * inverse - average * inverse
        weight_sum, bias_sum = tl.reduce((above * normal, above), 0, _add_pairs)
        above *= weight[None, :]
        below = above * inverse
        if has_d_sum:
            below += beside
        along, level = tl.reduce((above * normal, above), 1, _add_pairs)
        share = inverse * (-1.0 / width)
        below += normal * (along[:, None] * share) + level[:, None] * share
        tl.store(dx + offset, below.to(dx.dtype.element_ty), mask)
        if dropout > 0:
            below *= factor
            tl.store(dy + offset, below.to(dy.dtype.element_ty), mask)
        return weight_sum, bias_sum, tl.sum(below, 0)

    @triton.jit(do_not_specialize_on_alignment=["seed"])
    def _add_norm_backward(
        d_normed,
        d_sum,
        total,
        mean,
        rstd,
        weight,
        seed,
        dx,
        dy,
        partials,
        length,
        stride,
        width: tl.constexpr,
        dropout: tl.constexpr,
        has_d_sum: tl.constexpr,
        rows: tl.constexpr,
        block: tl.constexpr,
        stages: tl.constexpr,
    ):
        column = tl.arange(0, block)
        inside = column < width
        if dropout > 0:
            seed = tl.load(seed)
        start, step = tl.program_id(0) * rows, tl.num_programs(0) * rows
        if stages == 1:
            weight_sum, bias_sum, y_sum = _rows_backward(
                d_normed, d_sum, total, mean, rstd, weight, seed, dx, dy, start, length,
                width, dropout, has_d_sum, rows, block, True,
            )  # fmt: skip
        else:
            weight = tl.load(weight + column, inside, other=0.0).to(tl.float32)
            weight_sum = tl.zeros([block], tl.float32)
            bias_sum = tl.zeros([block], tl.float32)
            y_sum = tl.zeros([block], tl.float32)
            for row in tl.range(start, length, step, num_stages=stages):
                sums = _rows_backward(
                    d_normed, d_sum, total, mean, rstd, weight, seed, dx, dy, row, length,
                    width, dropout, has_d_sum, rows, block, False,
                )  # fmt: skip
                weight_sum += sums[0]
                bias_sum += sums[1]
                y_sum += sums[2]
        partials += tl.program_id(0) * stride + column
        tl.store(partials, weight_sum, inside)
        tl.store(partials + width, bias_sum, inside)
        tl.store(partials + 2 * width, y_sum, inside)
