"""Whether a step updates the weights, and what its gradients are divided by.

In fp16 the loss is scaled, so that small gradients are not lost to rounding (Micikevicius et al.
2018, section 3.2). On a GPU with Triton, the decision is one kernel instead of 40.
"""

from dataclasses import dataclass

import torch

from folio import device

if device.can_compile():
    import triton
    from triton import language as tl


@dataclass(frozen=True)
class LossScale:
    """What the decision depends on, and the sums of TrainStep. Tensors are fp32 on the device."""

    stats: torch.Tensor  # the fields of StepStats
    scale: torch.Tensor  # what the loss is multiplied by
    updates: torch.Tensor  # since the scale changed
    grad_clip: float
    fp16: bool
    min_scale: float  # an overflow at this scale is an error
    double_after: int  # consecutive updates

    def check_and_scale(
        self, loss: torch.Tensor, norm: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the divisor for the gradients, and 1.0 if the update must be skipped, else 0.0.

        All are scalars on the device. norm is the gradient norm before unscaling. Updates stats
        and, in fp16, scale and updates.
        """
        if loss.is_cuda and device.can_compile():
            return self._launch(loss, norm)
        stats, scale, updates = self.stats, self.scale, self.updates
        divisor = scale * (norm / scale / self.grad_clip).clamp(min=1)
        finite = norm.isfinite()
        fatal = ~finite & (scale <= (self.min_scale if self.fp16 else 1.0))
        problem = (2 * fatal).masked_fill(~loss.isfinite(), 1)
        stats[-1] = torch.where(stats[-1] > 0, stats[-1], problem)
        running = stats[-1] == 0
        one = torch.ones_like(loss)
        new = torch.stack([loss, norm / scale, one, one])
        counted = torch.stack([running, running & finite, running & finite, running])
        stats[:-1] += new.masked_fill(~counted, 0)
        if self.fp16:
            full = updates + 1 == self.double_after
            rescaled = torch.where(finite, torch.where(full, 2 * scale, scale), scale / 2)
            scale.copy_(torch.where(running, rescaled, scale))
            updates.copy_(torch.where(running, (updates + 1) * (finite & ~full), updates))
        return divisor, (~(running & finite)).float()

    def _launch(self, loss: torch.Tensor, norm: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        divisor, skip = torch.empty_like(self.scale), torch.empty_like(self.scale)
        _check_and_scale[(1,)](norm, loss, divisor, skip, *self.arguments, self.fp16, num_warps=1)
        return divisor, skip

    @property
    def arguments(self) -> tuple[torch.Tensor | float, ...]:
        """Those of the Triton function check_and_scale after the first two, except for fp16."""
        tensors = self.stats, self.scale, self.updates
        min_scale = self.min_scale if self.fp16 else 1.0
        return *tensors, self.grad_clip, min_scale, self.double_after


if device.can_compile():

    @triton.jit
    def check_and_scale(
        scaled_norm,
        loss,
        stats,
        scale,
        updates,
        grad_clip,
        min_scale,
        double_after,
        fp16: tl.constexpr,
    ):
        """Like LossScale.check_and_scale, in a kernel of one program. scaled_norm is a value.

        Returns the divisor, and whether the weights are updated.
        """
        before, new_loss, found = tl.load(scale), tl.load(loss), tl.load(stats + 4)
        loss_sum, norm_sum = tl.load(stats), tl.load(stats + 1)
        norms, steps, number = tl.load(stats + 2), tl.load(stats + 3), tl.load(updates)
        norm = scaled_norm / before
        infinity = float("inf")
        finite = scaled_norm < infinity  # false if it is NaN
        problem = tl.where(finite | (before > min_scale), 0.0, 2.0)
        problem = tl.where(tl.abs(new_loss) < infinity, problem, 1.0)
        found = tl.where(found > 0, found, problem)
        running = found == 0
        updated = running & finite
        tl.debug_barrier()  # all threads must have read what is overwritten now
        tl.store(stats, loss_sum + tl.where(running, new_loss, 0.0))
        tl.store(stats + 1, norm_sum + tl.where(updated, norm, 0.0))
        tl.store(stats + 2, norms + tl.where(updated, 1.0, 0.0))
        tl.store(stats + 3, steps + tl.where(running, 1.0, 0.0))
        tl.store(stats + 4, found)
        if fp16:
            full = number + 1 == double_after
            rescaled = tl.where(finite, tl.where(full, 2 * before, before), before / 2)
            number_after = tl.where(finite & (full == 0), number + 1, 0.0)
            tl.store(scale, tl.where(running, rescaled, before))
            tl.store(updates, tl.where(running, number_after, number))
        return before * tl.where(norm > grad_clip, norm / grad_clip, 1.0), updated

    @triton.jit
    def _check_and_scale(
        norm,
        loss,
        divisor,
        skip,
        stats,
        scale,
        updates,
        grad_clip,
        min_scale,
        double_after,
        fp16: tl.constexpr,
    ):
        found, updated = check_and_scale(
            tl.load(norm), loss, stats, scale, updates, grad_clip, min_scale, double_after, fp16
        )
        tl.store(divisor, found)
        tl.store(skip, tl.where(updated, 0.0, 1.0))
