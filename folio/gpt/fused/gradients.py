"""The gradients of the blocks' parameters, by kernels for several blocks at once.

The rest of the backward pass does not depend on them, so they are computed on a second CUDA stream.
But while a product occupies all multiprocessors there, the main stream waits for longer than most
kernels of a small model take. So the operands of successive blocks are in one tensor, a stack, and
when the backward pass has come to the first of these blocks, one product computes the gradients of
the weights of all of them. In a large model, whose kernels take longer, stacks would need too much
memory: there, each has one block.

L is the number of blocks, N that of tokens, C that of channels, and P that of column_sums.py.
"""

from collections.abc import Iterable
from typing import TYPE_CHECKING, cast

import torch

from folio.gpt.fused.column_sums import add_partials, column_sums, partial_count
from folio.gpt.fused.side_stream import SideStream

if TYPE_CHECKING:
    from folio.gpt.model import GPT, Block

# Bytes of the operands of the products that are computed together; 0: of one block.
MAX_STACKED = 256 << 20
_PRODUCTS = ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")


class Gradients:
    """The gradients of the blocks and of the final layer norm, in memory that is allocated once.

    For each product `name` of block i, the passes write its argument to `x` and the gradient of its
    result to `dy`, and then call `multiply`. All calls are for the blocks in the same order.
    """

    def __init__(self, model: "GPT"):
        blocks = cast("list[Block]", list(model.transformer.h))
        norms = [*(block.ln_1 for block in blocks[1:]), model.transformer.ln_f]
        C, like = model.params.n_embd, model.transformer.ln_f.weight
        self._side = SideStream(like.device)
        self._gradients: list[tuple[torch.Tensor, torch.Tensor]] = []
        self._weights: dict[str, torch.Tensor] = {}  # [L, out, in] of each product
        for name in _PRODUCTS:
            weights = [block.get_parameter(f"{name}.weight") for block in blocks]
            self._weights[name] = like.new_empty(len(blocks), *weights[0].shape)
            self._gradients += zip(weights, self._weights[name], strict=True)
        # The vectors whose partial sums are in `partials`, in its order.
        self._vectors, self._first_norm = like.new_empty(len(blocks), 13 * C), like.new_empty(2 * C)
        for block, norm, out in zip(blocks, norms, self._vectors, strict=True):
            attn, mlp = block.attn, block.mlp
            vectors = [norm.weight, norm.bias, mlp.c_proj.bias]
            vectors += [block.ln_2.weight, block.ln_2.bias, attn.c_proj.bias]
            self._divide(out, [*vectors, attn.c_attn.bias, mlp.c_fc.bias])
        self._divide(self._first_norm, [blocks[0].ln_1.weight, blocks[0].ln_1.bias])
        self._size = 1  # blocks per stack
        # By what they contain, and the number of their blocks divided by _size.
        self._stacks: dict[tuple[str, int], torch.Tensor] = {}

    def _divide(self, out: torch.Tensor, parameters: Iterable[torch.Tensor]) -> None:
        """Make the parts of `out` the gradients of vectors."""
        vectors = list(parameters)
        sizes = [vector.numel() for vector in vectors]
        self._gradients += zip(vectors, out.split(sizes), strict=True)

    def place(self) -> None:
        """Make them the parameters' `grad`."""
        for parameter, gradient in self._gradients:
            parameter.grad = gradient

    def begin(self, rows: int) -> None:
        """Must be called before each forward pass, of so many tokens."""
        self._rows, self._stacks = rows, {}
        weights = self._weights.values()
        size = sum(rows * sum(w.shape[1:]) * w.element_size() for w in weights)  # of a block
        blocks = len(self._vectors)
        most = min(max(1, MAX_STACKED // size), blocks)
        self._size = -(-blocks // -(-blocks // most))  # the stacks are about equally long

    def forget(self) -> None:
        """Free the memory that `x` has returned: the block will be computed again."""
        self._stacks = {}

    def x(self, name: str, i: int) -> torch.Tensor:
        """Memory for the argument of a product, [N, in]."""
        return self._part(f"{name}, x", i, self._rows, self._weights[name].shape[2])

    def dy(self, name: str, i: int) -> torch.Tensor:
        """Memory for the gradient of a product's result, [N, out]."""
        return self._part(f"{name}, dy", i, self._rows, self._weights[name].shape[1])

    def partials(self, i: int) -> torch.Tensor:
        """Memory for partial sums, [P, 13C] in fp32: 3C of them for the layer norm after block i
        and the bias before it, 3C for ln_2 and attn.c_proj.bias, 3C for attn.c_attn.bias, which
        `add_sums` computes, and 4C for mlp.c_fc.bias."""
        rows, columns = partial_count(self._rows), self._vectors.shape[1]
        return self._part("partials", i, rows, columns, torch.float32)

    def _part(
        self, name: str, i: int, rows: int, columns: int, dtype: torch.dtype | None = None
    ) -> torch.Tensor:
        key, first = (name, i // self._size), i // self._size * self._size
        if key not in self._stacks:
            count = min(self._size, len(self._vectors) - first)
            self._stacks[key] = self._vectors.new_empty(count, rows, columns, dtype=dtype)
        return self._stacks[key][i - first]

    def multiply(self, name: str, i: int) -> None:
        """Compute the gradients of a product's weights, if block i completes the operands."""
        if i % self._size == 0:
            dy, x = (self._stacks.pop((f"{name}, {kind}", i // self._size)) for kind in ("dy", "x"))
            self._side.run(_multiply, dy, x, self._weights[name][i : i + len(x)])

    def add_sums(self, i: int) -> None:
        """Add up all partial sums, if block i completes them. Must be called before `multiply` for
        attn.c_attn."""
        if i % self._size == 0:
            partials = self._stacks.pop(("partials", i // self._size))
            C = partials.shape[2] // 13
            d_qkv = self._stacks["attn.c_attn, dy", i // self._size]
            self._side.run(column_sums, d_qkv, partials[:, :, 6 * C : 9 * C])
            self._side.run(add_partials, partials, self._vectors[i : i + len(partials)])

    def advance(self, i: int) -> None:
        """Must be called at the end of each block: see SideStream."""
        if i % self._size == 0:
            self._side.advance()

    def add_first_norm(self, partials: torch.Tensor) -> None:
        """Add up the partial sums for the layer norm of the first block, [P, 2C]."""
        self._side.run(add_partials, partials[None], self._first_norm[None])

    def join(self) -> None:
        """Let the current CUDA stream wait for the gradients."""
        self._side.join()


def _multiply(dy: torch.Tensor, x: torch.Tensor, out: torch.Tensor) -> None:
    if len(out) == 1:
        torch.mm(dy[0].T, x[0], out=out[0])
    else:
        torch.bmm(dy.transpose(1, 2), x, out=out)
