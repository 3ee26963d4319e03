"""GPT's output head for training: the loss and its gradients without autograd, chunk by chunk.

It computes what GPT.loss does after the blocks, as in folio/gpt/cross_entropy.py. Label smoothing
and soft targets need no pass of their own: they only change the gradient of the logits.

N, C and V are those of cross_entropy.py.
"""

from typing import TYPE_CHECKING

import torch

from folio.gpt import cross_entropy_kernel
from folio.gpt.cross_entropy import GPU_CHUNK_ROWS
from folio.gpt.fused.fp8 import Fp8Products
from folio.gpt.fused.side_stream import SideStream

if TYPE_CHECKING:
    from folio.gpt.model import GPT

_ROWS_MULTIPLE = 64  # of the weight: see cross_entropy._loss_and_gradients


class HalfProducts:
    """The products with the head's weight [V, C] that FusedHead waits for, in its precision."""

    def __init__(self, weight: torch.Tensor):
        self._weight = weight

    def begin(self, hidden: torch.Tensor) -> torch.Tensor:
        """What `logits` takes rows of; call it first in each step. hidden [N, C]."""
        return hidden

    def logits(self, rows: torch.Tensor) -> torch.Tensor:
        """The logits [R, V] of some rows of what `begin` returned."""
        return rows @ self._weight.T

    def fp8_like(self, _logits: torch.Tensor) -> torch.Tensor | None:
        """An empty tensor for the gradient of the logits in another precision: none."""
        return None

    def d_hidden(
        self,
        d_logits: torch.Tensor,
        fp8: torch.Tensor | None,
        factor: torch.Tensor,
        out: torch.Tensor,
    ) -> None:
        """Write the gradient of R rows to out [R, C], given that of their logits."""
        torch.mm(d_logits, self._weight, out=out)


class FusedHead:
    """`head(hidden, y, scale, soft)` returns the loss and the gradient of `hidden`.

    The weight's gradient overwrites `gradient`. A second CUDA stream computes it and the loss: they
    must not be used before `join`. The weight becomes part of a tensor with rows of zeros after it,
    so that it does not have to be padded in each step; so does its gradient.
    """

    def __init__(self, model: "GPT", fp8: bool = False):
        """fp8: compute the products as fp8.py does. The weight's gradient stays in half precision:
        it would need the gradient of the logits by columns."""
        self.model = model
        parameter = model.transformer.wte.weight
        self._size = len(parameter)
        rows = -(-self._size // _ROWS_MULTIPLE) * _ROWS_MULTIPLE
        self._weight = parameter.new_zeros(rows, parameter.shape[1])
        self._weight[: self._size] = parameter.detach()
        parameter.data = self._weight[: self._size]
        self._padded_gradient = torch.zeros_like(self._weight)
        self.gradient = self._padded_gradient[: self._size]
        self._constants: dict[float, torch.Tensor] = {}
        self._products = (Fp8Products if fp8 else HalfProducts)(self._weight)
        self._side = SideStream(parameter.device)

    def __call__(
        self,
        hidden: torch.Tensor,
        y: torch.Tensor,
        scale: torch.Tensor | float,
        soft: torch.Tensor | None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """hidden [N, C], y [N], soft [N, V] or None; see GPT.loss.

        The gradients are multiplied by `scale`. The loss is in fp32.
        """
        self.model.transformer.wte.weight.grad = self.gradient
        factor = self._as_tensor(scale / len(y))
        inputs, d_hidden = self._products.begin(hidden), torch.empty_like(hidden)
        losses: list[torch.Tensor] = []
        for start in range(0, len(y), GPU_CHUNK_ROWS):
            part = slice(start, start + GPU_CHUNK_ROWS)
            if losses:
                self._side.join()  # the logits before these take much memory
            soft_part = soft if soft is None else soft[part]
            logits = self._products.logits(inputs[part])
            fp8 = self._products.fp8_like(logits)
            losses.append(self._losses_(logits, y[part], factor, soft_part, fp8))
            self._products.d_hidden(logits, fp8, factor, d_hidden[part])
            self._side.run(self._add_gradient, logits, hidden[part], start > 0)
            del logits, fp8  # the memory is used again after `join`
        loss = torch.empty((), device=hidden.device)
        self._side.run(_mean, losses, loss)
        return loss, d_hidden

    def join(self) -> None:
        """Let the current CUDA stream wait for the loss and the weight's gradient."""
        self._side.join()

    def _as_tensor(self, factor: torch.Tensor | float) -> torch.Tensor:
        """A scalar in fp32. Constants are kept, so that a CUDA graph has no kernel for them."""
        if isinstance(factor, torch.Tensor):
            return factor
        if factor not in self._constants:
            self._constants[factor] = torch.full((), factor, device=self._weight.device)
        return self._constants[factor]

    def _losses_(
        self,
        logits: torch.Tensor,
        y: torch.Tensor,
        factor: torch.Tensor,
        soft: torch.Tensor | None,
        fp8: torch.Tensor | None,
    ) -> torch.Tensor:
        """The losses of y in nats. Overwrites the logits with their gradient, times factor.

        fp8: see cross_entropy_.
        """
        model, bias = self.model, self.model.log_multiplicity
        soft_share = 0.0 if soft is None else model.distill_weight
        last_share = 0.0 if bias is None else (1 - soft_share) * model.unseen_probability
        if bias is None and soft is None:
            return cross_entropy_kernel.cross_entropy_(logits, self._size, None, y, factor, fp8)
        return cross_entropy_kernel.mixed_cross_entropy_(
            logits, self._size, bias, y, factor, soft, soft_share, last_share, fp8
        )

    def _add_gradient(self, d_logits: torch.Tensor, rows: torch.Tensor, add: bool) -> None:
        self._padded_gradient.addmm_(d_logits.T, rows, beta=int(add))


def _mean(parts: list[torch.Tensor], out: torch.Tensor) -> None:
    torch.mean(parts[0] if len(parts) == 1 else torch.cat(parts), 0, out=out)
