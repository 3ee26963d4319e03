"""Column sums of matrices with many rows, which are the gradients of biases and layer norms.

They take two kernels. The first one, often part of a kernel that reads the matrix anyway, writes
partial sums: P programs, each of which adds up a fixed set of rows. The second one adds up the P
partial sums. Each sum has a fixed order, so it is bitwise reproducible.

G is the number of matrices, N that of their rows, K that of their columns, and P the number of
partial sums.
"""

import torch

from folio import device

if device.can_compile():
    import triton
    from triton import language as tl

_ROWS, _MORE_ROWS = 4, 2  # that a program reads at once: of few, and of many rows
_MAX_PARTIALS = 528  # four programs for each of an H100's 132 multiprocessors
_SUMMED, _COLUMNS = 256, 32  # partial sums and columns that a program of the second kernel reads


def partial_count(rows: int) -> int:
    """P, the number of partial sums of a matrix with so many rows."""
    return min(-(-rows // _ROWS), _MAX_PARTIALS)


def rows_at_once(rows: int) -> tuple[int, int]:
    """How many rows of a matrix a program reads at once, and how many times."""
    at_once = _ROWS if rows <= _ROWS * _MAX_PARTIALS else _MORE_ROWS
    return at_once, -(-rows // (at_once * partial_count(rows)))


def column_sums(x: torch.Tensor, partials: torch.Tensor) -> None:
    """Write partial sums of the columns of x [G, N, K] to partials [G, P, K] in fp32.

    x is contiguous, and so are the rows of partials.
    """
    G, N, K = x.shape
    block = min(1024, triton.next_power_of_2(K))
    grid = (partials.shape[1], triton.cdiv(K, block), G)
    strides = partials.stride(0), partials.stride(1)
    _column_sums[grid](x, partials, N, *strides, width=K, rows=_ROWS, block=block, num_warps=2)


def add_partials(partials: torch.Tensor, out: torch.Tensor) -> None:
    """Add up partials [G, P, K] in fp32 into out [G, K] in any precision.

    out is contiguous, and so are the rows of partials.
    """
    G, P, K = partials.shape
    strides = partials.stride(0), partials.stride(1)
    _add_partials[triton.cdiv(K, _COLUMNS), G](
        partials, out, P, K, *strides, rows=_SUMMED, block=_COLUMNS, num_warps=8
    )


if device.can_compile():

    @triton.jit
    def _column_sums(
        x,
        partials,
        length,
        matrix_stride,
        stride,
        width: tl.constexpr,
        rows: tl.constexpr,
        block: tl.constexpr,
    ):
        matrix = tl.program_id(2).to(tl.int64)
        x += matrix * length * width
        partials += matrix * matrix_stride
        row = tl.arange(0, rows)[:, None]
        column = tl.program_id(1) * block + tl.arange(0, block)
        inside = column < width
        total = tl.zeros([block], tl.float32)
        for start in range(tl.program_id(0) * rows, length, tl.num_programs(0) * rows):
            tile = x + tl.cast(start, tl.int64) * width + row * width + column[None, :]
            mask = (row < length - start) & inside[None, :]
            total += tl.sum(tl.load(tile, mask, other=0.0).to(tl.float32), 0)
        tl.store(partials + tl.program_id(0) * stride + column, total, inside)

    @triton.jit
    def _add_partials(
        partials,
        out,
        count,
        width,
        matrix_stride,
        stride,
        rows: tl.constexpr,
        block: tl.constexpr,
    ):
        matrix = tl.program_id(1).to(tl.int64)
        partials += matrix * matrix_stride
        out += matrix * width
        row = tl.arange(0, rows)[:, None]
        column = tl.program_id(0) * block + tl.arange(0, block)
        inside = column < width
        total = tl.zeros([rows, block], tl.float32)
        for start in range(0, count, rows):
            tile = partials + (start + row) * stride + column[None, :]
            total += tl.load(tile, (row < count - start) & inside[None, :], other=0.0)
        tl.store(out + column, tl.sum(total, 0).to(out.dtype.element_ty), inside)
