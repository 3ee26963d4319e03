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
from folio.gpt.fused.column_sums import add_partials, column_sums, partial_count
from folio.gpt.fused.gelu import gelu, gelu_backward_
from folio.gpt.fused.gradients import Gradients
from folio.gpt.fused.layer_norm import Normed, add_norm, add_norm_backward
from folio.gpt.fused.side_stream import SideStream

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
    parameters' precision that are allocated once. Their products and sums run on a second CUDA
    stream, since the other gradients do not depend on them. Every sum has a fixed order.

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
        self._gradients: Gradients | None = None
        self._side: SideStream | None = None

    @torch.no_grad()
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map the embeddings x [B, T, C] to the inputs of the head, [B, T, C]."""
        t, p = self.model.transformer, self.model.params
        self._shape, self._kept = x.shape, []
        self._dropout = p.dropout if self.model.training else 0.0
        if self._dropout:  # from the device's generator, whose state a CUDA graph advances
            self._seeds = torch.randint(2**31, (3 * p.n_layer,), device=x.device)
        residual, y = x.contiguous().view(-1, p.n_embd), None
        for i, block in enumerate(self._blocks):
            norm = self._add_norm(residual, y, block.ln_1, 3 * i - 1)
            activations = self._block(i, norm)
            residual, y = activations.norm_2.sum, _linear(activations.activation, block.mlp.c_proj)
            self._kept.append(norm.sum if self.model.gradient_checkpointing else activations)
            del norm, activations  # the memory is free for the next block
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
        gradients = self._gradients = self._gradients or Gradients(self.model)
        side = self._side = self._side or SideStream(d_hidden.device)
        gradients.place()
        for i in reversed(range(len(self._blocks))):
            partials = _partials(len(d_normed), 13 * C, d_hidden.device)
            parts = partials.split([3 * C, 3 * C, 3 * C, 4 * C], 1)
            dx, dy = self._add_norm_backward(d_normed, dx, norm, scale, parts[0], 3 * i + 2)
            activations = self._kept.pop()
            if isinstance(activations, torch.Tensor):
                norm = self._add_norm(activations, None, self._blocks[i].ln_1)
                activations = self._block(i, norm)
            dx, d_normed = self._block_backward(i, activations, dx, dy, parts[1:], side)
            norm, scale = activations.norm_1, self._blocks[i].ln_1.weight
            side.run(add_partials, partials, gradients.vectors[i])
            side.advance()
        partials = _partials(len(d_normed), 3 * C, d_hidden.device)
        dx, _ = self._add_norm_backward(d_normed, dx, norm, scale, partials)
        side.run(add_partials, partials[:, : 2 * C], gradients.vectors[-1])
        return dx.view(self._shape)

    def join(self) -> None:
        """Let the current CUDA stream wait for the gradients of the parameters."""
        if self._side:
            self._side.join()

    def _block(self, i: int, norm: Normed) -> _Activations:
        """Block i, from its first layer norm to the input of its last product."""
        block, seed = self._blocks[i], self._seed(3 * i)
        n_head, dropout = self.model.params.n_head, self._dropout
        qkv = _linear(norm.normed, block.attn.c_attn).view(*self._shape[:2], -1)
        attended, logsumexp = attention.attend(qkv, n_head, dropout, seed)
        y = _linear(attended.view(norm.sum.shape), block.attn.c_proj)
        norm_2 = self._add_norm(norm.sum, y, block.ln_2, 3 * i + 1)
        preactivation = _linear(norm_2.normed, block.mlp.c_fc)
        activation = gelu(preactivation)
        return _Activations(norm, qkv, attended, logsumexp, norm_2, preactivation, activation)

    def _block_backward(
        self,
        i: int,
        a: _Activations,
        dx: torch.Tensor,
        dy: torch.Tensor,
        partials: tuple[torch.Tensor, ...],
        side: SideStream,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The gradients of the residual stream before block i and of its first layer norm's result.

        dx and dy are those of the residual stream after its attention and of its last product.
        partials: for ln_2 and attn.c_proj.bias, for c_attn.bias, and for c_fc.bias.
        """
        block, seed = self._blocks[i], self._seed(3 * i)
        attn, mlp = block.attn, block.mlp
        side.run(_weight_gradient, mlp.c_proj, dy, a.activation)
        d_fc = dy @ mlp.c_proj.weight
        gelu_backward_(d_fc, a.preactivation, partials[2])
        side.run(_weight_gradient, mlp.c_fc, d_fc, a.norm_2.normed)
        d_normed, scale = d_fc @ mlp.c_fc.weight, block.ln_2.weight
        dx, dy = self._add_norm_backward(d_normed, dx, a.norm_2, scale, partials[0], 3 * i + 1)
        side.run(_weight_gradient, attn.c_proj, dy, a.attended.view(dy.shape))
        d_attended = (dy @ attn.c_proj.weight).view(self._shape)
        saved = (a.qkv, a.attended, a.logsumexp, self.model.params.n_head, self._dropout, seed)
        d_qkv = attention.attend_backward(d_attended, *saved).view(len(dy), -1)
        side.run(column_sums, d_qkv, partials[1])
        side.run(_weight_gradient, attn.c_attn, d_qkv, a.norm_1.normed)
        return dx, d_qkv @ attn.c_attn.weight

    def _add_norm(
        self, x: torch.Tensor, y: torch.Tensor | None, norm: nn.LayerNorm, seed: int = -1
    ) -> Normed:
        return add_norm(x, y, norm.weight, norm.bias, self._dropout, self._seed(seed))

    def _add_norm_backward(
        self,
        d_normed: torch.Tensor,
        d_sum: torch.Tensor | None,
        norm: Normed,
        scale: torch.Tensor,
        partials: torch.Tensor,
        seed: int = -1,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """seed: -1 if there was no y."""
        dropout = self._dropout if seed >= 0 else 0.0
        return add_norm_backward(d_normed, d_sum, norm, scale, partials, dropout, self._seed(seed))

    def _seed(self, number: int) -> torch.Tensor | None:
        """Of block i, the numbers are 3i for its attention and 3i + 1 and 3i + 2 for what follows
        its two products into the residual stream."""
        return self._seeds[number : number + 1] if self._dropout and number >= 0 else None


def _partials(rows: int, columns: int, device: torch.device) -> torch.Tensor:
    return torch.empty(partial_count(rows), columns, device=device)


def _linear(x: torch.Tensor, linear: nn.Linear) -> torch.Tensor:
    return torch.addmm(linear.bias, x, linear.weight.T)


def _weight_gradient(linear: nn.Linear, d_out: torch.Tensor, x: torch.Tensor) -> None:
    """Write the gradient of the weight of a product, given that of its result and its argument."""
    assert linear.weight.grad is not None
    torch.mm(d_out.T, x, out=linear.weight.grad)
