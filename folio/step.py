"""One optimizer step: accumulate the gradient in the chosen precision, clip it, update.

The host never waits for the device here. What a step finds is summed up on the device, and the
device itself passes over an update that is not finite; the host reads that when it wants to log.

In half precision a copy of the model computes, which is written anew from the fp32 weights after
each update: so no update is too small to count (Micikevicius et al. 2018, section 3.1). On a GPU
the whole step is one CUDA graph.
"""

import copy
from dataclasses import dataclass

import torch

from folio import compiler
from folio.device import DTYPES, deterministic, record

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
        compiled: bool = False,
        exact: bool = True,
    ):
        """The optimizer must be a fused one: those obey the device in what they pass over.

        compiled: make kernels for the model, where that is possible: on a GPU in half precision.
        exact: the same bits whenever the same step is done.
        """
        self.model, self.optimizer = model, optimizer
        self.device, self.grad_clip = device, grad_clip
        self.exact = exact and device.type == "cuda"  # a CPU's are always
        self.fp16 = precision == "fp16"
        self.device_decides = device.type != "mps"  # whose fused optimizers have no such arguments
        self.scale = torch.tensor(_FIRST_SCALE if self.fp16 else 1.0, device=device)
        self.updates = torch.zeros((), device=device)  # since the scale was changed
        self.found = torch.zeros(5, device=device)  # Found's fields; of problem, the index
        self.computing = model if precision == "fp32" else _copy(model, DTYPES[precision])
        self.judge = _judge
        half_on_gpu = device.type == "cuda" and precision != "fp32"
        self.compiled = compiled and half_on_gpu and compiler.works()
        if self.compiled:
            self.computing.compile(fullgraph=True, dynamic=False)
            self.judge = torch.compile(_judge, fullgraph=True, dynamic=False)
        # An optimizer that reads the rate from the device can be recorded. Gradient checkpointing
        # cannot: it puts the generator's state aside.
        capturable = optimizer.defaults.get("capturable", False)
        self.rate = torch.zeros((), device=device) if capturable else None
        self.records = capturable and not getattr(model, "gradient_checkpointing", False)
        self._recorded = None  # the step as a graph

    def __call__(self, batches: list[tuple[torch.Tensor, torch.Tensor]], rate: float) -> None:
        """Batches of x, y [B, T] and the learning rate; `read` tells what came of it."""
        for group in self.optimizer.param_groups:
            group["lr"] = rate if self.rate is None else self.rate.fill_(rate)
        inputs = [t.to(self.device, non_blocking=True) for batch in batches for t in batch]
        if self.records and self._recorded is None:
            before = self.found.clone()
            self.found[4] = 1  # as after a step that was not finite: recording changes nothing
            with deterministic(self.exact):
                self._recorded = record(self._step, *inputs)
            self.found.copy_(before)
        if self._recorded:
            self._recorded(*inputs)
        else:
            with deterministic(self.exact):
                self._step(*inputs)

    def _step(self, *inputs: torch.Tensor) -> None:
        loss, batches = torch.zeros((), device=self.device), len(inputs) // 2
        for number, (x, y) in enumerate(zip(inputs[::2], inputs[1::2], strict=True)):
            part = self.computing.loss(x, y, self.scale / batches)
            part.backward()
            loss += part.detach() / batches
            if self.computing is not self.model:
                self._take_gradients(first=number == 0)
        self._update(loss)
        if self.computing is self.model:
            self.model.zero_grad(set_to_none=True)
        else:
            self._renew()

    @torch.no_grad()
    def _take_gradients(self, first: bool) -> None:
        """Add the copy's gradients to the model's, in fp32."""
        pairs = zip(self.model.parameters(), self.computing.parameters(), strict=True)
        pairs = [(p, copied) for p, copied in pairs if copied.grad is not None]
        for p, _ in pairs:
            p.grad = torch.empty_like(p) if p.grad is None else p.grad
        ours, copied = [p.grad for p, _ in pairs], [copied.grad for _, copied in pairs]
        torch._foreach_copy_(ours, copied) if first else torch._foreach_add_(ours, copied)
        self.computing.zero_grad(set_to_none=True)

    @torch.no_grad()
    def _renew(self) -> None:
        """Make the copy what the model is."""
        torch._foreach_copy_([*self.computing.parameters()], [*self.model.parameters()])

    @torch.no_grad()
    def _update(self, loss: torch.Tensor) -> None:
        """Update the weights, unless something is not finite, and take down what was found."""
        gradients = [p.grad for p in self.model.parameters() if p.grad is not None]
        norm = torch.nn.utils.get_total_norm(gradients)
        state = (self.found, self.scale, self.updates)
        divisor, unwanted = self.judge(loss, norm, *state, self.grad_clip, self.fp16)
        if self.device_decides:
            self.optimizer.grad_scale, self.optimizer.found_inf = divisor, unwanted
            self.optimizer.step()
        elif not unwanted:
            torch._foreach_div_(gradients, divisor)
            self.optimizer.step()

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
        """After the model's and the optimizer's."""
        self.reset()
        for name, tensor in self.state_dict().items():
            tensor.copy_(state[name])
        self._recorded = None  # it knows the tensors that there were before
        if self.computing is not self.model:
            self._renew()


def _judge(loss, norm, found, scale, updates, grad_clip, fp16):
    """What the gradients are to be divided by, and 1.0 if there is to be no update, else 0.0.

    All are scalars on the device but found, which is brought up to date, as is, in fp16, the scale.
    norm is that of the gradients times scale.
    """
    divisor = scale * (norm / scale / grad_clip).clamp(min=1)
    fits = norm.isfinite()
    hopeless = ~fits & (scale <= (_LEAST_SCALE if fp16 else 1.0))
    problem = (2 * hopeless).masked_fill(~loss.isfinite(), 1)
    found[4] = torch.where(found[4] > 0, found[4], problem)
    goes_on = found[4] == 0
    one = torch.ones_like(loss)
    new = torch.stack([loss, norm / scale, one, one])
    counts = torch.stack([goes_on, goes_on & fits, goes_on & fits, goes_on])
    found[:4] += new.masked_fill(~counts, 0)
    if fp16:
        full = updates + 1 == _DOUBLE_AFTER
        rescaled = torch.where(fits, torch.where(full, 2 * scale, scale), scale / 2)
        scale.copy_(torch.where(goes_on, rescaled, scale))
        updates.copy_(torch.where(goes_on, (updates + 1) * (fits & ~full), updates))
    return divisor, (~(goes_on & fits)).float()


def _copy(model: torch.nn.Module, dtype: torch.dtype) -> torch.nn.Module:
    """The model with its parameters, not its constants, in another precision."""
    copied = copy.deepcopy(model)
    for p in copied.parameters():
        p.data = p.data.to(dtype)
    return copied
