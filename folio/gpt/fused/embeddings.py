"""GPT's token and position embeddings: a forward and a backward pass without autograd.

B, T, C and V are those of model.py, and N = B * T. The token embedding is also the head's weight,
so its gradient is added to what the head has written.

The rows of a token's gradient are added up in the order of their positions in the batch. A second
CUDA stream sorts the ids while the passes run, so that only the additions come after them. Every
sum has a fixed order, so it is bitwise reproducible.
"""

from typing import TYPE_CHECKING

import torch

from folio import device
from folio.gpt.fused.side_stream import SideStream

if device.can_compile():
    import triton
    from triton import language as tl

if TYPE_CHECKING:
    from folio.gpt.model import GPT

_ROWS, _COLUMNS, _WINDOWS = 32, 64, 16  # that a program of the backward pass reads at once
# Of the compiler's pipeline. Half of them are for the rows' positions, which are loaded first, so
# the inputs of three rounds of such a program are under way at once.
_STAGES = 7


class FusedEmbeddings:
    """`forward` and then `backward` are what GPT.hidden does before the blocks, and its gradients.

    Overwrites the gradient of the position embedding, a tensor that is allocated once.
    """

    def __init__(self, model: "GPT"):
        self.model = model
        self._gradient = torch.empty_like(model.transformer.wpe.weight)
        self._side = SideStream(self._gradient.device)
        # Of all ids: sorted, their positions in the batch, and where each id's last one ends.
        self._sorted: tuple[torch.Tensor, ...] = ()
        self._dropout = 0.0
        self._seed: torch.Tensor | None = None

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """Map token ids [B, T] to the inputs of the blocks, [B, T, C]."""
        t, (B, T) = self.model.transformer, ids.shape
        tokens, positions, C = t.wte.weight, t.wpe.weight, self.model.params.n_embd
        assert self.model.params.block_size >= T, "more tokens than the context"
        ids = ids.contiguous()
        self._side.run(self._sort, ids)
        self._dropout = self.model.params.dropout if self.model.training else 0.0
        # From the device's generator, whose state a CUDA graph advances.
        draw = self._dropout > 0
        self._seed = torch.randint(2**31, (1,), device=ids.device) if draw else None
        x = tokens.new_empty(B, T, C)
        block = min(1024, triton.next_power_of_2(C))
        _embed[(B * T, triton.cdiv(C, block))](
            *(ids, tokens, positions, x, self._seed, T, C, self._dropout),
            *(draw, block),
            num_warps=max(1, block // 256),
        )
        return x

    def backward(self, d_x: torch.Tensor, d_tokens: torch.Tensor) -> None:
        """Given the gradient d_x [B, T, C] of forward's result, write the gradient of the position
        embedding to its `grad`, and add that of the token embedding to d_tokens [V, C].

        Overwrites d_x.
        """
        positions, (B, T, C) = self.model.transformer.wpe.weight, d_x.shape
        d_x = d_x.contiguous()
        if self._dropout:
            block = 1024
            grid = (triton.cdiv(d_x.numel(), block),)
            _drop_[grid](d_x, self._seed, d_x.numel(), self._dropout, block)
        positions.grad = self._gradient
        self._side.join()
        rows = len(positions)
        _embed_backward[(triton.cdiv(B * T, _ROWS) + rows, triton.cdiv(C, _COLUMNS))](
            *(*self._sorted, d_x, d_tokens, self._gradient, B, T, C, rows),
            *(_ROWS, _COLUMNS, _WINDOWS, _STAGES),
            num_warps=4,
        )

    def _sort(self, ids: torch.Tensor) -> None:
        ids, order = ids.flatten().int().sort(stable=True)
        self._sorted = ids, order, torch.searchsorted(ids, ids, right=True)


if device.can_compile():

    @triton.jit
    def _keep(seed, at, dropout):
        """Whether the elements at the offsets `at` are kept."""
        return tl.rand(tl.load(seed), at.to(tl.int32)) >= dropout

    @triton.jit
    def _embed(
        ids,
        tokens,
        positions,
        x,
        seed,
        length,
        width,
        dropout,
        drops: tl.constexpr,
        block: tl.constexpr,
    ):
        row = tl.program_id(0).to(tl.int64)
        column = tl.program_id(1) * block + tl.arange(0, block)
        inside = column < width
        token = tokens + tl.load(ids + row).to(tl.int64) * width + column
        position = positions + tl.program_id(0) % length * width + column
        y = tl.load(token, inside).to(tl.float32) + tl.load(position, inside).to(tl.float32)
        if drops:
            y = tl.where(_keep(seed, row * width + column, dropout), y / (1 - dropout), 0.0)
        tl.store(x + row * width + column, y.to(x.dtype.element_ty), inside)

    @triton.jit
    def _drop_(x, seed, size, dropout, block: tl.constexpr):
        at = tl.program_id(0).to(tl.int64) * block + tl.arange(0, block)
        y = tl.load(x + at, at < size).to(tl.float32) / (1 - dropout)
        y = tl.where(_keep(seed, at, dropout), y, 0.0)
        tl.store(x + at, y.to(x.dtype.element_ty), at < size)

    @triton.jit
    def _embed_backward(
        ids,
        order,
        ends,
        d_x,
        d_tokens,
        d_positions,
        batch_size,
        length,
        width,
        rows,
        block_rows: tl.constexpr,
        block_columns: tl.constexpr,
        block_windows: tl.constexpr,
        stages: tl.constexpr,
    ):
        """The last `rows` programs: a position each. The others: a part of the sorted ids each."""
        program = tl.program_id(0)
        row = program - (tl.num_programs(0) - rows)
        column = tl.program_id(1) * block_columns + tl.arange(0, block_columns)
        if row < 0:
            first, count = program * block_rows, batch_size * length
            _add_tokens(
                ids, order, ends, d_x, d_tokens, first, column, count, width, block_rows, stages
            )
        else:
            total = _sum_windows(
                d_x, row, column, batch_size, length, width, block_windows, block_columns
            )
            gradient = d_positions + row.to(tl.int64) * width + column
            tl.store(gradient, total.to(gradient.dtype.element_ty), column < width)

    @triton.jit
    def _sum_windows(
        d_x,
        row,
        column,
        batch_size,
        length,
        width,
        block_windows: tl.constexpr,
        block_columns: tl.constexpr,
    ):
        """Position `row` of all windows: 0 if they are shorter."""
        total = tl.zeros([block_columns], tl.float32)
        if row < length:
            for start in range(0, batch_size, block_windows):
                window = start + tl.arange(0, block_windows)
                tile = d_x + (window * length + row).to(tl.int64)[:, None] * width + column[None, :]
                mask = (window < batch_size)[:, None] & (column < width)[None, :]
                total += tl.sum(tl.load(tile, mask, other=0.0).to(tl.float32), 0)
        return total

    @triton.jit
    def _add_tokens(
        ids,
        order,
        ends,
        d_x,
        d_tokens,
        first,
        column,
        count,
        width,
        block_rows: tl.constexpr,
        stages: tl.constexpr,
    ):
        """Add up all rows of the tokens whose first one is among the block_rows sorted ids from
        `first` on, by a product with a matrix of 0 and 1.

        Only the last of these tokens can have more rows, which follow directly.
        """
        at = first + tl.arange(0, block_rows)
        own = tl.load(ids + at, at < count, other=-1)
        last = tl.minimum(first + block_rows, count) - 1
        if tl.load(ids + last) != tl.load(ids + first - 1, first > 0, other=-1):
            is_first = own != tl.load(ids + at - 1, (at > 0) & (at < count), other=-1)
            mask = is_first[:, None] & (column < width)[None, :]
            gradient = d_tokens + own.to(tl.int64)[:, None] * width + column[None, :]
            before = tl.load(gradient, mask, other=0.0)
            total = tl.zeros([block_rows, column.shape[0]], tl.float32)
            end = tl.load(ends + last).to(tl.int32)
            for start in tl.range(first, end, block_rows, num_stages=stages):
                other = start + tl.arange(0, block_rows)
                row = tl.load(order + other, other < end, other=0).to(tl.int64)
                tile = d_x + row[:, None] * width + column[None, :]
                x = tl.load(tile, (other < end)[:, None] & (column < width)[None, :], other=0.0)
                same = own[:, None] == tl.load(ids + other, other < end, other=-1)[None, :]
                total = tl.dot(same.to(x.dtype), x, total)
            total += before.to(tl.float32)
            tl.store(gradient, total.to(gradient.dtype.element_ty), mask)
