"""GELU and its gradient, which also adds up the gradient's columns.

It is the approximation with tanh of Hendrycks and Gimpel 2016, section 2, which is that of
F.gelu(approximate="tanh"): x (1 + tanh(u)) / 2, where u = sqrt(2 / pi) (x + 0.044715 x^3). This
equals x sigmoid(2u).

N is the number of tokens, K the number of channels.
"""

import math

import torch

from folio import device
from folio.gpt.fused.column_sums import rows_at_once

if device.can_compile():
    import triton
    from triton import language as tl

    # -2u / ln(2), so that sigmoid(2u) = 1 / (1 + 2^z), is z = x * (_LINEAR + _CUBIC * x^2).
    _LINEAR = tl.constexpr(-2 * math.sqrt(2 / math.pi) / math.log(2))
    _CUBIC = tl.constexpr(-2 * math.sqrt(2 / math.pi) / math.log(2) * 0.044715)
    _MINUS_LN_2 = tl.constexpr(-math.log(2))

_BLOCK = 4096  # elements per program of the forward pass


def gelu(x: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
    """GELU of a contiguous tensor of any shape. out: memory for it, contiguous."""
    out, size = torch.empty_like(x) if out is None else out, x.numel()
    masked = size % _BLOCK > 0
    _gelu[(triton.cdiv(size, _BLOCK),)](x, out, size, masked=masked, block=_BLOCK, num_warps=4)
    return out


def gelu_backward_(gradient: torch.Tensor, x: torch.Tensor, partials: torch.Tensor) -> None:
    """Replace the gradient of gelu(x) [N, K] by that of x [N, K].

    Writes partial sums of its columns to partials [P, K] in fp32 (see column_sums.py). gradient and
    x are contiguous, and so are the rows of partials.
    """
    N, K = x.shape
    rows, _ = rows_at_once(N)
    block = max(64, min(1024, K & -K))  # a power of two, by which most K are divisible
    grid = (len(partials), triton.cdiv(K, block))
    _gelu_backward[grid](
        gradient,
        x,
        partials,
        N,
        partials.stride(0),
        width=K,
        rows=rows,
        block=block,
        num_warps=rows,
        # The limit per thread raises their number: without it, the compiler uses fewer, and a
        # program waits for its second load only after it has used the first one's result.
        maxnreg=80,
    )


if device.can_compile():

    @triton.jit
    def _sigmoid(x, square):
        """sigmoid(2u) in fp32, given x and its square. 2^z may be infinite: then this is 0.

        A division takes five instructions, the square of a reciprocal square root two.
        """
        root = tl.rsqrt(1.0 + tl.exp2(x * (_LINEAR + _CUBIC * square)))
        return root * root

    @triton.jit
    def gelu_of(x):
        """GELU of x in fp32."""
        return x * _sigmoid(x, x * x)

    @triton.jit
    def gelu_slope(x):
        """The derivative of GELU at x in fp32."""
        square = x * x
        sigmoid = _sigmoid(x, square)
        slope = x * (_MINUS_LN_2 * _LINEAR + 3 * _MINUS_LN_2 * _CUBIC * square)  # x d(2u)/dx
        return sigmoid + slope * (sigmoid - sigmoid * sigmoid)

    @triton.jit
    def _gelu(x, out, size, masked: tl.constexpr, block: tl.constexpr):
        start = tl.program_id(0).to(tl.int64) * block
        offset = tl.arange(0, block)
        mask = offset < size - start if masked else None
        value = tl.load(x + start + offset, mask).to(tl.float32)
        tl.store(out + start + offset, gelu_of(value).to(out.dtype.element_ty), mask)

    @triton.jit
    def _gelu_backward(
        gradient,
        x,
        partials,
        length,
        stride,
        width: tl.constexpr,
        rows: tl.constexpr,
        block: tl.constexpr,
    ):
        row = tl.arange(0, rows)[:, None]
        column = tl.program_id(1) * block + tl.arange(0, block)
        inside = column < width
        total = tl.zeros([block], tl.float32)
        for start in range(tl.program_id(0) * rows, length, tl.num_programs(0) * rows):
            first = tl.cast(start, tl.int64) * width
            offset = row * width + column[None, :]
            mask = (row < length - start) & inside[None, :]
            value = tl.load(x + first + offset, mask, other=0.0).to(tl.float32)
            above = tl.load(gradient + first + offset, mask, other=0.0).to(tl.float32)
            below = above * gelu_slope(value)
            tl.store(gradient + first + offset, below.to(gradient.dtype.element_ty), mask)
            total += tl.sum(below, 0)
        tl.store(partials + tl.program_id(0) * stride + column, total, inside)
