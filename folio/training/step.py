"""One optimizer step: forward and backward in the chosen precision, clipping, update.

The host never waits for the device here. Losses and gradient norms are accumulated on the device,
which also skips non-finite updates by itself; the host reads the sums when a row of the history is
due.

On a GPU the whole step is one CUDA graph, if it can be captured.
"""

from collections.abc import Callable
from dataclasses import dataclass, fields

import torch

from folio.device import capture, deterministic
from folio.errors import UserError
from folio.training import direct_update, optimizer_state
from folio.training.loss_scale import LossScale
from folio.training.weights import Weights

# In fp16 the loss is scaled (Micikevicius et al. 2018, section 3.2): the scale doubles after
# _DOUBLE_AFTER consecutive updates and halves after an overflow. An overflow at _MIN_SCALE is an
# error.
_INITIAL_SCALE, _MIN_SCALE, _DOUBLE_AFTER = 2.0**16, 2.0**-10, 2000
_PROBLEMS = (None, "loss", "gradient")


class NonFiniteError(ArithmeticError):
    """The loss or the gradient is infinite or NaN. The weights were not updated."""


@dataclass(frozen=True)
class StepStats:
    """Sums over the steps since the last reset, up to the first non-finite step, if any."""

    loss: float  # sum of the steps' losses, nats
    norm: float  # sum of the finite gradient norms, before clipping
    norms: int  # number of finite gradient norms
    steps: int  # number of steps, including those that fp16 skipped
    problem: str | None  # what was not finite in the step after them, which ended training


class TrainStep:
    """`step(batches, learning_rate)` makes one update from one or more micro-batches.

    The gradient is that of the mean loss over all windows of all processes, so accumulation and
    several processes are equivalent to one large batch. An update whose gradient overflows in fp16
    is skipped. After any other non-finite loss or gradient, there are no further updates.
    """

    def __init__(
        self,
        weights: Weights,
        optimizer: torch.optim.Optimizer,
        grad_clip: float,
        compiled: bool = False,
        exact: bool = True,
        windows: int | None = None,
        input_noise: float = 0.0,
        teachers: Callable[[torch.Tensor], torch.Tensor] | None = None,
        fused: bool = True,
        fp8_head: bool = False,
    ):
        """Works with any optimizer of weights.parameters whose step needs no closure. PyTorch's
        fused Adam, AdamW and Adagrad unscale gradients and skip updates on the device; for any
        other, TrainStep does both, and the host waits for the device.

        compiled: torch.compile the model if possible, that is, on a GPU in half precision, and if
        the passes are not fused.
        exact: make repeated steps bitwise reproducible.
        windows: the number of windows in all processes' micro-batches of a step. None: those of
        this process.
        input_noise: the share of input tokens that are replaced by random ones.
        teachers: given x, return the probabilities that the targets partly are.
        fused: use the passes of folio/gpt/fused, if possible (see Weights.fuse). With AdamW in one
        process, a step with one micro-batch also updates all weights at once.
        fp8_head: with these passes, compute the head's products in fp8.
        Raises UserError if the optimizer is capturable but does not work on this device, or if
        fp8_head is not possible.
        """
        device = weights.device
        _check_capturable(optimizer, device)
        self.weights, self.optimizer = weights, optimizer
        self.device, self.windows = device, windows
        self.input_noise, self.teachers = input_noise, teachers
        self.exact = exact and device.type == "cuda"  # steps on a CPU are always reproducible
        self.fp16 = weights.precision == "fp16"
        self.optimizer_skips = _reads_found_inf(optimizer, device)
        self.scale = torch.tensor(_INITIAL_SCALE if self.fp16 else 1.0, device=device)
        self.updates = torch.zeros((), device=device)  # since the scale changed
        # The fields of StepStats, of which the last one is an index into _PROBLEMS.
        self.stats = torch.zeros(len(fields(StepStats)), device=device)
        limits = (grad_clip, self.fp16, _MIN_SCALE, _DOUBLE_AFTER)
        self._loss_scale = LossScale(self.stats, self.scale, self.updates, *limits)
        if fused:
            weights.fuse(fp8_head)
        if compiled and not weights.fused:
            weights.compile()
        # A graph can be captured of an optimizer that reads the learning rate and found_inf from
        # the device.
        capturable = optimizer.defaults.get("capturable", False)
        self.captures = capturable and self.optimizer_skips and weights.can_capture
        # The rate of all groups with this lr_scale. One of them takes a kernel in each step.
        scales = {group.get("lr_scale", 1.0) for group in optimizer.param_groups if capturable}
        self._rates = {scale: torch.zeros((), device=device) for scale in scales}
        self._graph: Callable[..., None] | None = None
        self._state_checked = False  # whether checkpoints can contain the optimizer's state
        self._direct: direct_update.DirectUpdate | None = None
        if direct_update.is_possible(weights, optimizer):
            self._direct = direct_update.DirectUpdate(weights, optimizer, self._loss_scale)

    def __call__(
        self, batches: list[tuple[torch.Tensor, torch.Tensor]], learning_rate: float
    ) -> None:
        """Make one update. batches: (x, y) of each micro-batch, [B, T]. `read` returns the stats.

        A parameter group's rate is learning_rate times its `lr_scale` (1 by default). The first
        update raises UserError if the optimizer's state cannot be saved.
        """
        for scale, rate in self._rates.items():
            rate.fill_(learning_rate * scale)
        for group in self.optimizer.param_groups:
            scale = group.get("lr_scale", 1.0)
            group["lr"] = self._rates.get(scale, learning_rate * scale)
        inputs = [t.to(self.device, non_blocking=True) for batch in batches for t in batch]
        if self.captures and self._graph is None:
            before = self.stats.clone()
            self.stats[-1] = 1  # as after a non-finite step, so that capturing changes no weights
            with deterministic(self.exact):
                self._graph = capture(self._step, *inputs)
            self.stats.copy_(before)
        if self._graph:
            self._graph(*inputs)
        else:
            with deterministic(self.exact):
                self._step(*inputs)

    def _step(self, *inputs: torch.Tensor) -> None:
        batches = list(zip(inputs[::2], inputs[1::2], strict=True))
        windows = self.windows or sum(len(x) for x, _ in batches)
        if self._direct and len(batches) == 1 and windows == len(batches[0][0]):
            # Without fp16, the scale is always 1, and a constant takes no kernel.
            self._direct(self._pass(*batches[0], self.scale if self.fp16 else 1.0))
            return
        weights, loss = self.weights, torch.zeros((), device=self.device)
        for number, (x, y) in enumerate(batches, 1):
            divisor = windows / len(x)
            weights.begin(is_last=number == len(batches))
            scale = self.scale / (divisor / weights.gradient_factor)
            loss += self._pass(x, y, scale) / divisor
            weights.collect(is_first=number == 1, is_last=number == len(batches))
        self._update(*weights.reduce(loss))
        weights.finish()

    def _pass(self, x: torch.Tensor, y: torch.Tensor, scale: torch.Tensor | float) -> torch.Tensor:
        """Compute the gradients of a micro-batch, times `scale`. Returns the loss."""
        soft = [self.teachers(x)] if self.teachers else []
        if self.input_noise:
            x = _replace_some(x, self.input_noise)
        return self.weights.loss_and_gradients(x, y, scale, *soft)

    @torch.no_grad()
    def _update(self, loss: torch.Tensor, norm: torch.Tensor) -> None:
        """Unscale, clip and update, unless a value is not finite. Adds to the stats.

        norm: of the gradients, before unscaling.
        """
        divisor, skip = self._loss_scale.check_and_scale(loss, norm)
        if self.optimizer_skips:
            setattr(self.optimizer, "grad_scale", divisor)  # noqa: B010 (for mypy)
            setattr(self.optimizer, "found_inf", skip)  # noqa: B010
        elif skip:
            return
        else:
            torch._foreach_div_(self.weights.gradients, divisor)
        self.optimizer.step()
        if not self._state_checked:  # most optimizers create their state in the first update
            optimizer_state.save(self.optimizer)
            self._state_checked = True

    def release_graph(self) -> None:
        """Free the memory of the CUDA graph. The next step captures another one."""
        self._graph = None

    def read(self) -> StepStats:
        """Wait for the device, and return the sums since `reset`."""
        loss, norm, norms, steps, problem = self.stats.tolist()
        return StepStats(loss, norm, int(norms), int(steps), _PROBLEMS[int(problem)])

    def reset(self) -> None:
        self.stats.zero_()

    def state_dict(self) -> dict[str, torch.Tensor]:
        """The state that the next step depends on, and the sums not yet read into the history."""
        return {"scale": self.scale, "updates": self.updates, "stats": self.stats[:-1]}

    def load_state_dict(self, state: dict[str, torch.Tensor]) -> None:
        """Must be called after load_state_dict of the model and the optimizer."""
        self.reset()
        for name, tensor in self.state_dict().items():
            tensor.copy_(state[name])
        self.release_graph()  # it refers to the optimizer's previous tensors
        if self._direct:
            self._direct.reset()
        self.weights.sync_from_master()


def _replace_some(x: torch.Tensor, share: float) -> torch.Tensor:
    """Replace a random share of the tokens in x [B, T] by random other ones of x.

    So the replacements are as frequent as in the text (Xie et al. 2017, "Data Noising as Smoothing
    in Neural Network Language Models", section 3.3, unigram noising).
    """
    others = x.flatten()[torch.randint(x.numel(), x.shape, device=x.device)]
    return torch.where(torch.rand(x.shape, device=x.device) < share, others, x)


def _reads_found_inf(optimizer: torch.optim.Optimizer, device: torch.device) -> bool:
    """Whether the optimizer divides gradients by grad_scale and skips the update if found_inf.

    PyTorch marks such optimizers with this attribute for its GradScaler, but on MPS they ignore
    both. Fused SGD is left out: if its first update is skipped, its momentum is uninitialised.
    """
    suitable = isinstance(optimizer, torch.optim.Adam | torch.optim.AdamW | torch.optim.Adagrad)
    marked = getattr(optimizer, "_step_supports_amp_scaling", False)
    return suitable and marked and device.type != "mps"


def _check_capturable(optimizer: torch.optim.Optimizer, device: torch.device) -> None:
    """Raise UserError instead of PyTorch's AssertionError in the first update."""
    for group in optimizer.param_groups:
        if group.get("capturable") and not group.get("fused") and device.type != "cuda":
            raise UserError(
                f"{type(optimizer).__name__} with capturable=True needs a CUDA device, not"
                f" {device.type}; set capturable only on cuda, as folio/training/optimizers.py does"
            )
