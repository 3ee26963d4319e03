"""GPT's token and position embeddings: a forward and a backward pass without autograd.

B, T, C and V are those of model.py, and N = B * T. The token embedding is also the head's weight,
so its gradient is added to what the head has written.

Few tokens (N up to _FEW) find their rows' gradients themselves, in one kernel: a program for each
position compares all ids with its own one, and the program of an id's first position adds up the
rows of all of them in their order. For more tokens, PyTorch sorts the ids. Either way, sums have a
fixed order, so they are bitwise reproducible.
"""

from typing import TYPE_CHECKING

import torch

from folio import device

if device.can_compile():
    import triton
    from triton import language as tl

if TYPE_CHECKING:
    from folio.gpt.model import GPT

_FEW = 4096  # tokens
_IDS, _COLUMNS, _WINDOWS = 128, 64, 16  # that a program of the backward pass reads at once


class FusedEmbeddings:
    """`forward` and then `backward` are what GPT.hidden does before the blocks, and its gradients.

    Overwrites the gradient of the position embedding, a tensor that is allocated once.
    """

    def __init__(self, model: "GPT"):
        self.model = model
        self._gradient = torch.empty_like(model.transformer.wpe.weight)
        self._ids = torch.empty(0)
        self._dropout = 0.0
        self._seed: torch.Tensor | None = None

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """Map token ids [B, T] to the inputs of the blocks, [B, T, C]."""
        t, (B, T) = self.model.transformer, ids.shape
        tokens, positions, C = t.wte.weight, t.wpe.weight, self.model.params.n_embd
        assert self.model.params.block_size >= T, "more tokens than the context"
        self._ids = ids.contiguous()
        self._dropout = self.model.params.dropout if self.model.training else 0.0
        # From the device's generator, whose state a CUDA graph advances.
        draw = self._dropout > 0
        self._seed = torch.randint(2**31, (1,), device=ids.device) if draw else None
        x = tokens.new_empty(B, T, C)
        block = min(1024, triton.next_power_of_2(C))
        _embed[(B * T, triton.cdiv(C, block))](
            *(self._ids, tokens, positions, x, self._seed, T, C, self._dropout),
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
        few = B * T <= _FEW
        rows = len(positions)
        _embed_backward[(rows + B * T if few else rows, triton.cdiv(C, _COLUMNS))](
            *(self._ids, d_x, d_tokens, self._gradient, B, T, C, rows),
            *(_IDS, _COLUMNS, _WINDOWS),
            num_warps=4,
        )
        if not few:
            # as in the backward pass of torch.nn.functional.embedding
            dense = torch.ops.aten.embedding_dense_backward
            d_tokens += dense(d_x, self._ids, len(d_tokens), -1, False)


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
        d_x,
        d_tokens,
        d_positions,
        batch_size,
        length,
        width,
        rows,
        block_ids: tl.constexpr,
        block_columns: tl.constexpr,
        block_windows: tl.constexpr,
    ):
        """The first `rows` programs: a position each. The others, if any: a token each."""
        row = tl.program_id(0)
        column = tl.program_id(1) * block_columns + tl.arange(0, block_columns)
        if row < rows:
            total = _sum_windows(
                d_x, row, column, batch_size, length, width, block_windows, block_columns
            )
            gradient = d_positions + row.to(tl.int64) * width + column
            tl.store(gradient, total.to(gradient.dtype.element_ty), column < width)
        else:
            number, count = row - rows, batch_size * length
            _add_token(ids, d_x, d_tokens, number, column, count, width, block_ids, block_columns)

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
    def _add_token(
        ids,
        d_x,
        d_tokens,
        number,
        column,
        count,
        width,
        block_ids: tl.constexpr,
        block_columns: tl.constexpr,
    ):
        """Add up the rows of d_x that have the id of row `number`, if it is the first of them."""
        own = tl.load(ids + number)
        earlier = tl.zeros([8 * block_ids], tl.int32)
        for start in range(0, number, 8 * block_ids):
            at = start + tl.arange(0, 8 * block_ids)
            earlier += (tl.load(ids + at, at < number, other=-1) == own).to(tl.int32)
        if tl.sum(earlier, 0) == 0:
            total = tl.zeros([block_columns], tl.float32)
            for start in range(number // block_ids * block_ids, count, block_ids):
                at = start + tl.arange(0, block_ids)
                is_own = tl.load(ids + at, at < count, other=-1) == own
                if tl.sum(is_own.to(tl.int32), 0) > 0:
                    tile = d_x + at.to(tl.int64)[:, None] * width + column[None, :]
                    mask = is_own[:, None] & (column < width)[None, :]
                    total += tl.sum(tl.load(tile, mask, other=0.0).to(tl.float32), 0)
            gradient = d_tokens + own.to(tl.int64) * width + column
            total += tl.load(gradient, column < width, other=0.0).to(tl.float32)
            tl.store(gradient, total.to(gradient.dtype.element_ty), column < width)
