"""GPT's blocks and final layer norm: a forward and a backward pass without autograd.

B, T and C are those of model.py, and N = B * T. In both passes a layer norm is one kernel with the
residual addition and dropout before it, so the passes are divided there: block i is everything from
the output of its first layer norm to the outputs of its two products into the residual stream, and
the sum of the residual stream and the second one belongs to the next layer norm.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

import torch
from torch import nn

from folio.gpt.fused import attention
from folio.gpt.fused.column_sums import partial_count
from folio.gpt.fused.gelu import gelu, gelu_backward_
from folio.gpt.fused.gradients import Gradients
from folio.gpt.fused.layer_norm import Normed, add_norm, add_norm_backward

if TYPE_CHECKING:
    from folio.gpt.model import GPT, Block


@dataclass(frozen=True)
class _Activations:
    """What the backward pass of a block needs."""

    norm_1: Normed
    qkv: torch.Tensor  # [B, T, 3C]
    attended: torch.Tensor  # [B, T, C]
    logsumexp: torch.Tensor  # [B, n_head, T]
    norm_2: Normed
    preactivation: torch.Tensor  # [N, 4C]
    activation: torch.Tensor  # [N, 4C]


class FusedBlocks:
    """`forward` and then `backward` are GPT._run_blocks and its gradients, for training on a GPU.

    Each call of backward overwrites the gradients of the parameters, which are tensors in the
    parameters' precision that are allocated once (see gradients.py). Every sum has a fixed order.

    If the model has gradient_checkpointing, forward keeps only the residual stream before each
    block, and backward computes the block again from it, with the same dropout: the same bits.
    """

    def __init__(self, model: "GPT"):
        self.model, self._blocks = model, cast("list[Block]", list(model.transformer.h))
        self._shape = torch.Size()  # B, T, C
        self._dropout, self._seeds = 0.0, torch.empty(0)
        # Of each block; a tensor is the residual stream before it, if the block is computed again.
        self._kept: list[_Activations | torch.Tensor] = []
        self._last: Normed | None = None  # the result of the final layer norm
        self._gradients = Gradients(model)

    @torch.no_grad()
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map the embeddings x [B, T, C] to the inputs of the head, [B, T, C]."""
        t, p = self.model.transformer, self.model.params
        self._shape, self._kept = x.shape, []
        self._dropout = p.dropout if self.model.training else 0.0
        if self._dropout:  # from the device's generator, whose state a CUDA graph advances
            self._seeds = torch.randint(2**31, (3 * p.n_layer,), device=x.device)
        residual, y = x.contiguous().view(-1, p.n_embd), None
        self._gradients.begin(len(residual))
        for i, block in enumerate(self._blocks):
            norm = self._first_norm(i, residual, y)
            activations = self._block(i, norm)
            residual, y = activations.norm_2.sum, _linear(activations.activation, block.mlp.c_proj)
            self._kept.append(norm.sum if self.model.gradient_checkpointing else activations)
            del norm, activations  # the memory is free for the next block
            if self.model.gradient_checkpointing:
                self._gradients.forget()
        self._last = self._add_norm(residual, y, t.ln_f, 3 * p.n_layer - 1)
        return self._last.normed.view(x.shape)

    @torch.no_grad()
    def backward(self, d_hidden: torch.Tensor) -> torch.Tensor:
        """Map the gradient of forward's result, [B, T, C], to the gradient of x, [B, T, C].

        Writes the gradients of the parameters of the blocks and of the final layer norm to `grad`.
        They must not be used before `join`. Call backward once after each forward: it frees what
        that has kept.
        """
        t, C = self.model.transformer, self.model.params.n_embd
        assert self._last is not None, "forward comes first"
        norm, scale, self._last = self._last, t.ln_f.weight, None
        dx, d_normed = None, d_hidden.contiguous().view(-1, C)
        gradients = self._gradients
        gradients.place()
        for i in reversed(range(len(self._blocks))):
            parts = gradients.partials(i).split([3 * C, 3 * C, 3 * C, 4 * C], 1)
            out = gradients.dy("mlp.c_proj", i)
            dx, dy = self._add_norm_backward(d_normed, dx, norm, scale, parts[0], 3 * i + 2, out)
            activations = self._kept.pop()
            if isinstance(activations, torch.Tensor):
                activations = self._block(i, self._first_norm(i, activations, None))
            dx, d_normed = self._block_backward(i, activations, dx, dy, parts[1], parts[3])
            norm, scale = activations.norm_1, self._blocks[i].ln_1.weight
            gradients.advance(i)
        partials = torch.empty(partial_count(len(d_normed)), 3 * C, device=d_hidden.device)
        dx, _ = self._add_norm_backward(d_normed, dx, norm, scale, partials)
        gradients.add_first_norm(partials[:, : 2 * C])
        return dx.view(self._shape)

    def join(self) -> None:
        """Let the current CUDA stream wait for the gradients of the parameters."""
        self._gradients.join()

    def _first_norm(self, i: int, residual: torch.Tensor, y: torch.Tensor | None) -> Normed:
        """The residual stream before block i, and the result of the block's first layer norm."""
        seed, out = -1 if y is None else 3 * i - 1, self._gradients.x("attn.c_attn", i)
        return self._add_norm(residual, y, self._blocks[i].ln_1, seed, out)

    def _block(self, i: int, norm: Normed) -> _Activations:
        """Block i, from its first layer norm to the input of its last product."""
        block, seed = self._blocks[i], self._seed(3 * i)
        n_head, dropout, x = self.model.params.n_head, self._dropout, self._gradients.x
        qkv = _linear(norm.normed, block.attn.c_attn).view(*self._shape[:2], -1)
        out = x("attn.c_proj", i).view(self._shape)
        attended, logsumexp = attention.attend(qkv, n_head, dropout, seed, out=out)
        y = _linear(attended.view(norm.sum.shape), block.attn.c_proj)
        norm_2 = self._add_norm(norm.sum, y, block.ln_2, 3 * i + 1, x("mlp.c_fc", i))
        preactivation = _linear(norm_2.normed, block.mlp.c_fc)
        activation = gelu(preactivation, x("mlp.c_proj", i))
        return _Activations(norm, qkv, attended, logsumexp, norm_2, preactivation, activation)

    def _block_backward(
        self,
        i: int,
        a: _Activations,
        dx: torch.Tensor,
        dy: torch.Tensor,
        norm_partials: torch.Tensor,
        fc_partials: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The gradients of the residual stream before block i and of its first layer norm's result.

        dx and dy are those of the residual stream after its attention and of its last product.
        The partials are those for ln_2 and attn.c_proj.bias, and for c_fc.bias.
        """
        block, seed, gradients = self._blocks[i], self._seed(3 * i), self._gradients
        attn, mlp = block.attn, block.mlp
        gradients.multiply("mlp.c_proj", i)
        d_fc = torch.mm(dy, mlp.c_proj.weight, out=gradients.dy("mlp.c_fc", i))
        gelu_backward_(d_fc, a.preactivation, fc_partials)
        gradients.multiply("mlp.c_fc", i)
        d_normed, out = d_fc @ mlp.c_fc.weight, gradients.dy("attn.c_proj", i)
        dx, dy = self._add_norm_backward(
            d_normed, dx, a.norm_2, block.ln_2.weight, norm_partials, 3 * i + 1, out
        )
        gradients.multiply("attn.c_proj", i)
        d_attended = (dy @ attn.c_proj.weight).view(self._shape)
        saved = (a.qkv, a.attended, a.logsumexp, self.model.params.n_head, self._dropout, seed)
        d_qkv = gradients.dy("attn.c_attn", i)
        attention.attend_backward(d_attended, *saved, d_qkv=d_qkv.view(a.qkv.shape))
        gradients.add_sums(i)
        gradients.multiply("attn.c_attn", i)
        return dx, d_qkv @ attn.c_attn.weight

    def _add_norm(
        self,
        x: torch.Tensor,
        y: torch.Tensor | None,
        norm: nn.LayerNorm,
        seed: int,
        out: torch.Tensor | None = None,
    ) -> Normed:
        return add_norm(x, y, norm.weight, norm.bias, self._dropout, self._seed(seed), out)

    def _add_norm_backward(
        self,
        d_normed: torch.Tensor,
        d_sum: torch.Tensor | None,
        norm: Normed,
        scale: torch.Tensor,
        partials: torch.Tensor,
        seed: int = -1,
        out: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """seed: -1 if there was no y."""
        dropout, tensor = self._dropout if seed >= 0 else 0.0, self._seed(seed)
        return add_norm_backward(d_normed, d_sum, norm, scale, partials, dropout, tensor, out)

    def _seed(self, number: int) -> torch.Tensor | None:
        """Of block i, the numbers are 3i for its attention and 3i + 1 and 3i + 2 for what follows
        its two products into the residual stream."""
        return self._seeds[number : number + 1] if self._dropout and number >= 0 else None


def _linear(x: torch.Tensor, linear: nn.Linear) -> torch.Tensor:
    return torch.addmm(linear.bias, x, linear.weight.T)
