"""One optimizer step: accumulate the gradient in the chosen precision, clip it, update.

The host never waits for the device here. What a step finds is summed up on the device, and the
device itself passes over an update that is not finite; the host reads that when it wants to log.
"""

from dataclasses import dataclass

import torch

from folio.device import autocast

# In fp16 the loss is scaled (Micikevicius et al. 2018, section 3.2): by twice as much after so many
# updates in a row, by half after an overflow. What overflows at the least scale is no overflow.
_FIRST_SCALE, _LEAST_SCALE, _DOUBLE_AFTER = 2.0**16, 2.0**-10, 2000
_PROBLEMS = (None, "loss", "gradient")


class NonFiniteError(ArithmeticError):
    """The loss or the gradient is infinite or not a number. The weights are as they were before."""


@dataclass(frozen=True)
class Found:
    """What the steps since the last reset have found, up to one that was not finite."""

    loss: float  # sum of their losses, nats
    norm: float  # sum of their gradients' norms before clipping, where those are finite
    norms: int  # how many are
    steps: int  # how many steps, those included that fp16 has passed over
    problem: str | None  # what was not finite in the step after them, and ended the training


class Step:
    """`step(batches, rate)` makes one update from several micro-batches.

    The gradient is that of the mean loss over all of them, so accumulating equals one large batch.
    An update whose gradient overflows in fp16 is passed over. After one that is not finite
    otherwise, there are no more.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        optimizer: torch.optim.Optimizer,
        device: torch.device,
        precision: str,
        grad_clip: float,
    ):
        """The optimizer must be a fused one: those obey the device in what they pass over."""
        self.model, self.optimizer = model, optimizer
        self.device, self.precision, self.grad_clip = device, precision, grad_clip
        self.device_decides = device.type != "mps"  # whose fused optimizers have no such arguments
        self.least_scale = _LEAST_SCALE if precision == "fp16" else 1.0
        first_scale = _FIRST_SCALE if precision == "fp16" else 1.0
        self.scale = torch.tensor(first_scale, device=device)
        self.updates = torch.zeros((), device=device)  # since the scale was changed
        self.found = torch.zeros(5, device=device)  # Found's fields; of problem, the index

    def __call__(self, batches: list[tuple[torch.Tensor, torch.Tensor]], rate: float) -> None:
        """Batches of x, y [B, T] and the learning rate; `read` tells what came of it."""
        loss = torch.zeros((), device=self.device)
        for x, y in batches:
            x, y = (t.to(self.device, non_blocking=True) for t in (x, y))
            with autocast(self.device, self.precision):
                part = self.model.loss(x, y) / len(batches)
            (part * self.scale).backward()
            loss += part.detach()
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self._update(loss)
        self.optimizer.zero_grad(set_to_none=True)

    @torch.no_grad()
    def _update(self, loss: torch.Tensor) -> None:
        """Update the weights, unless something is not finite, and take down what was found."""
        gradients = [p.grad for p in self.model.parameters() if p.grad is not None]
        norm = torch.nn.utils.get_total_norm(gradients) / self.scale
        fits = norm.isfinite()
        hopeless = ~fits & (self.scale <= self.least_scale)
        problem = torch.where(loss.isfinite(), 2 * hopeless, 1)
        self.found[4] = torch.where(self.found[4] > 0, self.found[4], problem)
        goes_on = self.found[4] == 0
        self._apply(gradients, self.scale * (norm / self.grad_clip).clamp(min=1), goes_on & fits)
        one = torch.ones_like(loss)
        found = torch.stack([loss, norm, one, one])
        counts = torch.stack([goes_on, goes_on & fits, goes_on & fits, goes_on])
        self.found[:4] += torch.where(counts, found, 0)
        if self.precision == "fp16":
            self._rescale(goes_on, fits)

    def _apply(self, gradients: list[torch.Tensor], scale: torch.Tensor, wanted: torch.Tensor):
        """An update by the gradients over scale, if it is wanted."""
        if not self.device_decides:
            torch._foreach_div_(gradients, scale)
            if wanted:
                self.optimizer.step()
            return
        self.optimizer.grad_scale, self.optimizer.found_inf = scale, (~wanted).float()
        self.optimizer.step()

    def _rescale(self, goes_on: torch.Tensor, fits: torch.Tensor) -> None:
        updates = torch.where(fits, self.updates + 1, 0)
        full = updates == _DOUBLE_AFTER
        scale = torch.where(fits, torch.where(full, 2 * self.scale, self.scale), self.scale / 2)
        self.scale.copy_(torch.where(goes_on, scale, self.scale))
        self.updates.copy_(torch.where(goes_on, updates * ~full, self.updates))

    def read(self) -> Found:
        """Wait for the device, and tell what it has found since `reset`."""
        loss, norm, norms, steps, problem = self.found.tolist()
        return Found(loss, norm, int(norms), int(steps), _PROBLEMS[int(problem)])

    def reset(self) -> None:
        self.found.zero_()

    def state_dict(self) -> dict[str, torch.Tensor]:
        """What the next step depends on, and what is found but not yet logged."""
        return {"scale": self.scale, "updates": self.updates, "found": self.found[:4]}

    def load_state_dict(self, state: dict[str, torch.Tensor]) -> None:
        self.reset()
        for name, tensor in self.state_dict().items():
            tensor.copy_(state[name])
