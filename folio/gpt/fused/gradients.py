"""The gradients of the blocks and of the final layer norm, in memory that is allocated once."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, cast

import torch

if TYPE_CHECKING:
    from folio.gpt.model import GPT, Block


class Gradients:
    """Tensors of the parameters' shapes and precision.

    `vectors` has one tensor for each block and a last one. Its parts are the gradients of the
    vectors whose partial sums FusedBlocks.backward computes together, in the same order: of the
    layer norm after the block and the bias before it, of the block's other vectors, and, in the
    last one, of the first layer norm.
    """

    def __init__(self, model: "GPT"):
        blocks = cast("list[Block]", list(model.transformer.h))
        norms = [*(block.ln_1 for block in blocks[1:]), model.transformer.ln_f]
        self.vectors: list[torch.Tensor] = []
        self._gradients: list[tuple[torch.Tensor, torch.Tensor]] = []
        for block, norm in zip(blocks, norms, strict=True):
            attn, mlp = block.attn, block.mlp
            for linear in (attn.c_attn, attn.c_proj, mlp.c_fc, mlp.c_proj):
                self._gradients.append((linear.weight, torch.empty_like(linear.weight)))
            vectors = [norm.weight, norm.bias, mlp.c_proj.bias]
            vectors += [block.ln_2.weight, block.ln_2.bias, attn.c_proj.bias]
            vectors += [attn.c_attn.bias, mlp.c_fc.bias]
            self._add_vectors(vectors)
        self._add_vectors([blocks[0].ln_1.weight, blocks[0].ln_1.bias])

    def _add_vectors(self, parameters: Sequence[torch.Tensor]) -> None:
        sizes = [p.numel() for p in parameters]
        self.vectors.append(parameters[0].new_empty(sum(sizes)))
        self._gradients += zip(parameters, self.vectors[-1].split(sizes), strict=True)

    def place(self) -> None:
        """Make them the parameters' `grad`."""
        for parameter, gradient in self._gradients:
            parameter.grad = gradient
