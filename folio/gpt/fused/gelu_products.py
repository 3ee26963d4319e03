"""Matrix products with GELU, or its gradient, in their epilogue: one pass over memory less.

The tiles are loaded and stored by the tensor memory accelerator of NVIDIA's Hopper GPUs, and each
program computes several of them. M is the number of tokens, K the number of channels of the
argument, and N that of the result.
"""

from dataclasses import dataclass

import torch

from folio import device

if device.can_compile():
    import triton
    from triton import language as tl
    from triton.tools.tensor_descriptor import TensorDescriptor

    from folio.gpt.fused.gelu import gelu_of, gelu_slope


@dataclass(frozen=True)
class Tile:
    """The shape of a kernel's programs."""

    m: int
    n: int
    k: int
    warps: int
    stages: int  # steps along K whose operands are under way at once
    programs: int  # at most so many, each of which computes several tiles
    halves: bool  # compute the epilogue for one half of the columns after the other


SMALL = Tile(64, 128, 64, 4, 3, 4096, False)
LARGE = Tile(128, 256, 64, 8, 3, 132, True)
_LARGE_ROWS = 4096
_GROUP = 8  # rows of tiles that are computed together, so that they share the weight in the cache


def linear_gelu(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, tile: Tile | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """x @ weight.T + bias, and GELU of that, [M, N]. x [M, K], weight [N, K], bias [N]."""
    M, N = len(x), len(weight)
    tile = tile or (LARGE if M >= _LARGE_ROWS else SMALL)
    preactivation, activation = x.new_empty(M, N), x.new_empty(M, N)
    _launch(x, weight, preactivation, activation, bias, False, tile)
    return preactivation, activation


def gelu_linear_backward(
    d_out: torch.Tensor,
    weight: torch.Tensor,
    preactivation: torch.Tensor,
    tile: Tile | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The gradient of the preactivation of a product gelu(preactivation) @ weight.T, [M, N].

    d_out [M, K] is the gradient of the product. weight [K, N], preactivation [M, N]. Also returns
    partial sums of the columns of the gradient, for add_partials (see column_sums.py).
    """
    M, N = preactivation.shape
    tile = tile or (LARGE if M >= _LARGE_ROWS else SMALL)
    gradient = torch.empty_like(preactivation)
    partials = torch.empty(triton.cdiv(M, tile.m), N, device=d_out.device)
    _launch(d_out, weight, preactivation, gradient, partials, True, tile)
    return gradient, partials


def _launch(
    x: torch.Tensor,
    weight: torch.Tensor,
    preactivation: torch.Tensor,
    out: torch.Tensor,
    vector: torch.Tensor,
    backward: bool,
    tile: Tile,
) -> None:
    (M, K), N = x.shape, out.shape[1]
    width = tile.n // 2 if tile.halves else tile.n  # columns of the epilogue
    by_rows = TensorDescriptor.from_tensor
    programs = min(triton.cdiv(M, tile.m) * triton.cdiv(N, tile.n), tile.programs)
    _product_gelu[(programs,)](
        by_rows(x, [tile.m, tile.k]),
        by_rows(weight, [tile.k, tile.n] if backward else [tile.n, tile.k]),
        by_rows(preactivation, [tile.m, width]),
        by_rows(out, [tile.m, width]),
        *(vector, M, N, K),
        backward=backward,
        block_m=tile.m,
        block_n=tile.n,
        block_k=tile.k,
        halves=tile.halves,
        group=_GROUP,
        num_warps=tile.warps,
        num_stages=tile.stages,
    )


if device.can_compile():

    @triton.jit
    def _epilogue(
        product, preactivation, out, vector, row, column, width, block_m, backward: tl.constexpr
    ):
        """Finish and store a tile of which product is x @ weight, in fp32."""
        columns = column + tl.arange(0, product.shape[1])
        inside = columns < width
        if backward:
            value = preactivation.load([row, column]).to(tl.float32)
            gradient = product * gelu_slope(value)
            out.store([row, column], gradient.to(out.dtype))
            partials = vector + (row // block_m).to(tl.int64) * width
            tl.store(partials + columns, tl.sum(gradient, 0), inside)
        else:
            bias = tl.load(vector + columns, inside, other=0.0).to(tl.float32)
            stored = (product + bias[None, :]).to(out.dtype)
            preactivation.store([row, column], stored)
            out.store([row, column], gelu_of(stored.to(tl.float32)).to(out.dtype))

    @triton.jit
    def _product_gelu(
        x,
        weight,
        preactivation,
        out,
        vector,
        length,
        width,
        depth,
        backward: tl.constexpr,
        block_m: tl.constexpr,
        block_n: tl.constexpr,
        block_k: tl.constexpr,
        halves: tl.constexpr,
        group: tl.constexpr,
    ):
        tiles_m = tl.cdiv(length, block_m)
        tiles_n = tl.cdiv(width, block_n)
        step = tl.num_programs(0)
        for tile in tl.range(tl.program_id(0), tiles_m * tiles_n, step, flatten=True):
            first = tile // (group * tiles_n) * group
            height = min(tiles_m - first, group)
            row = (first + tile % (group * tiles_n) % height) * block_m
            column = tile % (group * tiles_n) // height * block_n
            product = tl.zeros([block_m, block_n], tl.float32)
            for k in range(0, depth, block_k):
                w = weight.load([k, column]) if backward else weight.load([column, k]).T
                product = tl.dot(x.load([row, k]), w, product)
            rest = (width, block_m, backward)
            if halves:
                parts = product.reshape(block_m, 2, block_n // 2).permute(0, 2, 1)
                left, right = tl.split(parts)
                _epilogue(left, preactivation, out, vector, row, column, *rest)
                _epilogue(right, preactivation, out, vector, row, column + block_n // 2, *rest)
            else:
                _epilogue(product, preactivation, out, vector, row, column, *rest)
