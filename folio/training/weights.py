"""The weights in training: of one process, or replicated in several (sharded: sharded_weights.py).

The master weights are in fp32. In half precision, the passes run on a copy, which is synchronised
from the master weights after each update, so that small updates are not lost to rounding
(Micikevicius et al. 2018, section 3.1).
"""

import copy
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import torch
from torch import nn

from folio.device import DTYPES, can_compile, describe
from folio.distributed import Group
from folio.errors import UserError
from folio.gpt.model import GPT
from folio.training.params import TrainParams

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

    from folio.gpt.fused.passes import FusedPasses

Tensors = dict[str, torch.Tensor]


class Weights:
    """The weights of one process.

    `parameters` are what the optimizer updates, and `compute_model` is what the passes run on. A
    step calls, in this order: `begin` before the backward pass of each micro-batch and `collect`
    after it, `reduce` once, and `finish` after the update.
    """

    # What a micro-batch's loss must be multiplied by, so that the gradients add up over processes.
    gradient_factor = 1
    mesh: "DeviceMesh | None" = None  # of sharded weights
    description = ""  # of how they are distributed

    def __init__(self, model: GPT, precision: str):
        """precision: bf16, fp16 or fp32."""
        self.model, self.precision = model, precision
        self.device = next(model.parameters()).device
        self.is_half = precision != "fp32"
        self.compute_model = _copy(model, DTYPES[precision]) if self.is_half else model
        self.parameters: Sequence[nn.Parameter] = list(model.parameters())
        self.compiled = False
        self._passes: FusedPasses | None = None

    @property
    def fused(self) -> bool:
        """Whether the passes are those of folio/gpt/fused."""
        return self._passes is not None

    @property
    def can_capture(self) -> bool:
        """Whether a CUDA graph can be captured of a step."""
        # PyTorch's gradient checkpointing cannot be captured: it saves the random number
        # generator's state.
        return self.fused or not getattr(self.model, "gradient_checkpointing", False)

    def compile(self) -> None:
        """torch.compile the passes if possible, that is, on a GPU in half precision."""
        self.compiled = self.is_half and self.device.type == "cuda" and can_compile()
        if self.compiled:
            self.compute_model.compile(fullgraph=True, dynamic=False)

    def fuse(self, fp8_head: bool = False) -> None:
        """Use the passes of folio/gpt/fused if possible, that is, on a GPU in half precision, if
        they support the GPU and the model's sizes.

        Raises UserError if fp8_head (see folio/gpt/fused/fp8.py) and that is not possible.
        """
        if self.is_half and self.device.type == "cuda" and can_compile():
            from folio.gpt.fused import fp8, passes  # runs on a CPU do not need them

            has_fp8 = not fp8_head or fp8.supports(self.device)
            if has_fp8 and passes.supports(self.compute_model):
                self._passes = passes.FusedPasses(self.compute_model, fp8_head)
        if fp8_head and not self.fused:
            p = self.model.params
            raise UserError(
                "train.fp8_head needs bf16 or fp16 on an NVIDIA GPU with fp8 (Ada, Hopper or"
                " later), Triton with a C compiler, at most 4,096 channels, and 16, 32, 64 or 128"
                f" channels per head, but this run is in {self.precision} on"
                f" {describe(self.device)}, with {p.n_embd:,} channels and"
                f" {p.n_embd // p.n_head} per head: set it to false"
            )

    def loss_and_gradients(
        self, x: torch.Tensor, y: torch.Tensor, scale: torch.Tensor | float, *soft: torch.Tensor
    ) -> torch.Tensor:
        """Compute the gradients of compute_model, times `scale`. Returns the loss.

        Arguments as in GPT.loss. `soft` is passed on only if given.
        """
        if self._passes:
            return self._passes.loss_and_gradients(x, y, scale, *soft)
        loss = self.compute_model.loss(x, y, scale, *soft)
        loss.backward()
        return loss.detach()

    def begin(self, is_last: bool) -> None:
        """is_last: whether this is the step's last micro-batch."""

    @torch.no_grad()
    def collect(self, is_first: bool, is_last: bool) -> None:
        """Add the compute model's gradients to those of `parameters`, in fp32."""
        if not self.is_half:
            return
        master, computed = [], []
        for p, copied in zip(self.parameters, self.compute_model.parameters(), strict=True):
            if copied.grad is not None:
                p.grad = torch.empty_like(p) if p.grad is None else p.grad
                master.append(p.grad)
                computed.append(copied.grad)
        add = torch._foreach_copy_ if is_first else torch._foreach_add_
        add(master, computed)
        self.compute_model.zero_grad(set_to_none=True)

    def reduce(self, loss: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Add up the loss and the gradients over all processes. Returns the loss and the norm of
        the gradients, which are the same in all processes."""
        return loss, torch.nn.utils.get_total_norm(self.gradients)

    @property
    def gradients(self) -> list[torch.Tensor]:
        return [p.grad for p in self.parameters if p.grad is not None]

    def finish(self) -> None:
        if self.is_half:
            self.sync_from_master()
        else:
            self.model.zero_grad(set_to_none=True)

    @torch.no_grad()
    def sync_from_master(self) -> None:
        """Copy the master weights to the compute model."""
        if self.is_half:
            torch._foreach_copy_([*self.compute_model.parameters()], [*self.parameters])

    def state(self) -> Tensors:
        """The master weights by name: of sharded ones, the part in this process."""
        return self.model.state_dict()

    def rows(self) -> list[int]:
        """How many rows each of `parameters` has in all processes together."""
        return [len(p) for p in self.parameters]

    def load(self, tensors: Tensors) -> None:
        """Load what `state` returned. Raises RuntimeError if it is that of another model."""
        self.model.load_state_dict(tensors)

    def full(self, tensors: Tensors) -> Iterator[tuple[str, torch.Tensor]]:
        """Yield each of the tensors that `state` returned, whole. Collective."""
        yield from tensors.items()


class ReplicatedWeights(Weights):
    """Every process has all weights, and the gradients are added up once per step, in fp32.

    They are in one buffer, which is reduced at once: then each sum has a fixed order, so a resumed
    run is bitwise the same, and the reduction can be captured in a CUDA graph. DistributedData-
    Parallel arranges gradients differently after the first step, so it has neither property.
    """

    def __init__(self, model: GPT, precision: str, group: Group):
        super().__init__(model, precision)
        self._group = group
        self._buffer = torch.zeros(sum(p.numel() for p in self.parameters) + 1, device=self.device)
        views = self._buffer[:-1].split([p.numel() for p in self.parameters])
        for p, view in zip(self.parameters, views, strict=True):
            p.grad = view.view_as(p)

    def reduce(self, loss: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        self._buffer[-1] = loss
        self._group.sum_(self._buffer)
        return self._buffer[-1].clone(), torch.nn.utils.get_total_norm(self.gradients)

    def finish(self) -> None:
        if self.is_half:
            self.sync_from_master()
        else:
            self._buffer.zero_()


def place(model: GPT, precision: str, p: TrainParams, group: Group) -> Weights:
    """Place the weights as train.parallel requests. All processes must pass the same weights."""
    if group.count == 1:
        return Weights(model, precision)
    if p.parallel == "fsdp" or (p.parallel == "auto" and _needs_shards(model)):
        from folio.training.sharded_weights import ShardedWeights

        return ShardedWeights(model, precision, group)
    return ReplicatedWeights(model, precision, group)


def _needs_shards(model: GPT) -> bool:
    """Whether replicated weights would take more than half of the GPU's memory.

    A parameter takes 4 bytes as master weight, 4 as gradient, 8 in AdamW's state, 4 as best weight,
    and 4 in half precision with its gradient.
    """
    device = next(model.parameters()).device
    if device.type != "cuda":
        return False
    memory = torch.cuda.get_device_properties(device).total_memory
    return 24 * sum(p.numel() for p in model.parameters()) > memory / 2


def _copy(model: GPT, dtype: torch.dtype) -> GPT:
    """A copy of the model with its parameters, but not its constants, in another precision."""
    copied = copy.deepcopy(model)
    for p in copied.parameters():
        p.data = p.data.to(dtype)
    return copied
