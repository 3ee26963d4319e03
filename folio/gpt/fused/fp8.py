"""The head's products with its weight in fp8: the logits, and the gradient of the inputs.

An fp8 number of the format e4m3 has 3 bits of mantissa, and one of e5m2 has 2 but a wider range.
The inputs and the weight are in e4m3, and the gradient of the logits is in e5m2, as Micikevicius et
al. 2022, "FP8 Formats for Deep Learning", section 3, recommend. A tensor in e4m3 has one scale,
which maps its largest absolute value to 448, the largest number of e4m3. The scales are computed on
the device in each step.

On a GPU, a product in fp8 needs rows of the first matrix and columns of the second one that are
contiguous. So the weight is kept twice: by rows for the logits, and by columns for the gradient.

N, R, C and V are those of cross_entropy.py. V is padded.
"""

import torch

from folio import device
from folio.gpt.cross_entropy_kernel import FP8_FACTOR, runs_kernel

if device.can_compile():
    import triton
    from triton import language as tl

_MAX_E4M3 = 448.0
_TINY = 2.0**-100  # a lower limit of the largest absolute value, so that zeros stay zeros
_PARTIALS, _BLOCK = 1024, 4096  # partial maxima of a tensor; elements that a program reads at once
_ROWS, _COLUMNS = 64, 128  # of a tile that a program converts


def supports(where: torch.device) -> bool:
    """Whether this GPU has products in fp8: NVIDIA's, from Ada and Hopper on.

    C must be a multiple of 16, as in all models that the fused passes support.
    """
    return torch.cuda.get_device_capability(where) >= (8, 9)


class Fp8Products:
    """Like head.HalfProducts, but in fp8. The results are in the precision of the weight."""

    def __init__(self, weight: torch.Tensor):
        """weight [V, C]: contiguous."""
        self._weight = weight
        self._rows = torch.empty_like(weight, dtype=torch.float8_e4m3fn)
        self._columns = weight.new_empty(weight.shape[::-1], dtype=torch.float8_e4m3fn)
        scales = [torch.empty((), device=weight.device) for _ in range(2)]
        self._weight_scale, self._hidden_scale = scales

    def begin(self, hidden: torch.Tensor) -> torch.Tensor:
        """Convert the weight, and hidden [N, C], which is returned in e4m3."""
        rows = torch.empty_like(hidden, dtype=torch.float8_e4m3fn)
        quantize(self._weight, self._weight_scale, self._rows, self._columns)
        quantize(hidden, self._hidden_scale, rows)
        return rows

    def logits(self, rows: torch.Tensor) -> torch.Tensor:
        """The logits [R, V] of some rows of what `begin` returned."""
        return torch._scaled_mm(
            *(rows, self._rows.T, self._hidden_scale, self._weight_scale),
            out_dtype=self._weight.dtype,
            use_fast_accum=True,  # the sums have only C terms
        )

    def fp8_like(self, logits: torch.Tensor) -> torch.Tensor:
        """An empty tensor for the gradient of the logits in e5m2: see cross_entropy_."""
        return torch.empty_like(logits, dtype=torch.float8_e5m2)

    def d_hidden(
        self,
        d_logits: torch.Tensor,
        fp8: torch.Tensor | None,
        factor: torch.Tensor,
        out: torch.Tensor,
    ) -> None:
        """Write the gradient of R rows to out [R, C]. fp8: the gradient of their logits in e5m2.

        factor: that of cross_entropy_.
        """
        assert fp8 is not None
        torch._scaled_mm(
            *(fp8, self._columns.T, factor / FP8_FACTOR, self._weight_scale),
            out_dtype=out.dtype,
            out=out,
        )


def quantize(
    x: torch.Tensor, scale: torch.Tensor, rows: torch.Tensor, columns: torch.Tensor | None = None
) -> None:
    """Convert x [N, C] to e4m3: x is about scale * rows, with a scalar `scale` in fp32.

    Writes to scale, to rows [N, C] and to columns [C, N], if given, which is rows.T. All tensors
    are contiguous. Without Triton or a GPU, PyTorch operators compute the same result.
    """
    if runs_kernel(x):
        partials = torch.empty(_PARTIALS, device=x.device)
        _largest[(_PARTIALS,)](x, partials, x.numel(), _BLOCK, num_warps=4)
        height, width = x.shape
        _quantize[(triton.cdiv(height, _ROWS), triton.cdiv(width, _COLUMNS))](
            *(x, partials, scale, rows, columns, height, width),
            *(columns is not None, _PARTIALS, _ROWS, _COLUMNS),
            num_warps=4,
        )
        return
    largest = x.abs().max().float().clamp(min=_TINY)
    scale.copy_(largest / _MAX_E4M3)
    rows.copy_(x.float() * (_MAX_E4M3 / largest))
    if columns is not None:
        columns.copy_(rows.T)


if device.can_compile():
    _LARGEST, _LOWEST = tl.constexpr(_MAX_E4M3), tl.constexpr(_TINY)

    @triton.jit
    def _largest(x, partials, size, block: tl.constexpr):
        """The largest absolute value of each program's blocks of x; a NaN may be left out."""
        program = tl.program_id(0)
        found = tl.zeros([block], tl.float32)
        for start in range(program.to(tl.int64) * block, size, tl.num_programs(0) * block):
            at = start + tl.arange(0, block)
            found = tl.maximum(found, tl.abs(tl.load(x + at, at < size, other=0.0).to(tl.float32)))
        tl.store(partials + program, tl.max(found, 0))

    @triton.jit
    def _quantize(
        x,
        partials,
        scale,
        rows,
        columns,
        height,
        width,
        has_columns: tl.constexpr,
        count: tl.constexpr,
        block_rows: tl.constexpr,
        block_columns: tl.constexpr,
    ):
        """A tile of x, which is also transposed if has_columns."""
        largest = tl.maximum(tl.max(tl.load(partials + tl.arange(0, count)), 0), _LOWEST)
        if (tl.program_id(0) == 0) & (tl.program_id(1) == 0):
            tl.store(scale, largest / _LARGEST)
        row = tl.program_id(0).to(tl.int64) * block_rows + tl.arange(0, block_rows)
        column = tl.program_id(1).to(tl.int64) * block_columns + tl.arange(0, block_columns)
        inside = (row < height)[:, None] & (column < width)[None, :]
        at = row[:, None] * width + column[None, :]
        scaled = tl.load(x + at, inside, other=0.0).to(tl.float32) * (_LARGEST / largest)
        scaled = scaled.to(rows.dtype.element_ty)
        tl.store(rows + at, scaled, inside)
        if has_columns:
            inside = (column < width)[:, None] & (row < height)[None, :]
            tl.store(columns + column[:, None] * height + row[None, :], tl.trans(scaled), inside)
