"""One optimizer step: accumulate the gradient in the chosen precision, clip it, update."""

import math

import torch

from folio.device import autocast

# What overflows at any scale is no overflow. The scale begins at 2**16 and is halved each time.
_LEAST_SCALE = 2.0**-10


class NonFiniteError(ArithmeticError):
    """The loss or the gradient is infinite or not a number. The weights are as they were before."""


class Step:
    """`step(batches, rate)` makes one update from several micro-batches.

    The gradient is that of the mean loss over all of them, so accumulating equals one large batch.
    In fp16 the loss is scaled (Micikevicius et al. 2018, section 3.2), and an update whose gradient
    overflows is skipped.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        optimizer: torch.optim.Optimizer,
        device: torch.device,
        precision: str,
        grad_clip: float,
    ):
        self.model, self.optimizer = model, optimizer
        self.device, self.precision, self.grad_clip = device, precision, grad_clip
        self.scaler = torch.amp.GradScaler(device.type, enabled=precision == "fp16")

    def __call__(
        self, batches: list[tuple[torch.Tensor, torch.Tensor]], rate: float
    ) -> tuple[float, float]:
        """Batches of x, y [B, T] and the learning rate to the loss in nats and the gradient's norm.

        Raises NonFiniteError before the weights are touched.
        """
        total = torch.zeros((), device=self.device)
        for x, y in batches:
            x, y = (t.to(self.device, non_blocking=True) for t in (x, y))
            with autocast(self.device, self.precision):
                loss = self.model.loss(x, y) / len(batches)
            self.scaler.scale(loss).backward()
            total += loss.detach()
        self.scaler.unscale_(self.optimizer)
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.grad_clip)
        loss, norm = torch.stack([total, norm]).tolist()  # the step's one wait for the device
        self._check(loss, norm)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        return loss, norm

    def _check(self, loss: float, norm: float) -> None:
        is_finite = math.isfinite(norm)
        if not is_finite and self.scaler.is_enabled():  # it skips the update, and scales less
            is_finite = self.scaler.get_scale() > _LEAST_SCALE
        if not (math.isfinite(loss) and is_finite):
            self.optimizer.zero_grad(set_to_none=True)
            what = "gradient" if math.isfinite(loss) else "loss"
            raise NonFiniteError(f"the {what} is not finite")
