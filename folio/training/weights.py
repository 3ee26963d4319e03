"""The weights in training: of one process, or replicated in several (sharded: sharded_weights.py).

The master weights are in fp32. In half precision, the passes run on a copy, which is synchronised
from the master weights after each update, so that small updates are not lost to rounding
(Micikevicius et al. 2018, section 3.1).
"""

import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from folio.device import DTYPES, can_compile
from folio.distributed import Group
from folio.errors import UserError
from folio.gpt.model import GPT
from folio.training.params import TrainParams

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

Tensors = dict[str, torch.Tensor]
Pair = tuple[nn.Parameter, nn.Parameter]  # of the master weights and of the compute model


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

    @property
    def can_capture(self) -> bool:
        """Whether a CUDA graph can be captured of a step."""
        # Gradient checkpointing cannot be captured: it saves the random number generator's state.
        return not getattr(self.model, "gradient_checkpointing", False)

    def compile(self) -> None:
        """torch.compile the passes if possible, that is, on a GPU in half precision."""
        self.compiled = self.is_half and self.device.type == "cuda" and can_compile()
        if self.compiled:
            self.compute_model.compile(fullgraph=True, dynamic=False)

    def begin(self, loss: torch.Tensor, is_first: bool, is_last: bool) -> None:
        """loss: the sum so far. is_first, is_last: whether this is the step's first or last
        micro-batch."""
        self._is_first = is_first

    def collect(self) -> None:
        """Add the compute model's gradients to those of `parameters`, in fp32."""
        if self.is_half:
            self._add(list(zip(self.parameters, self.compute_model.parameters(), strict=True)))

    @torch.no_grad()
    def _add(self, pairs: list[Pair]) -> None:
        """Move the gradients of the second of each pair to the first, in fp32."""
        master, computed = [], []
        for p, copied in pairs:
            if copied.grad is not None:
                p.grad = torch.empty_like(p) if p.grad is None else p.grad
                master.append(p.grad)
                computed.append(copied.grad)
                copied.grad = None
        add = torch._foreach_copy_ if self._is_first else torch._foreach_add_
        add(master, computed)

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

    They are in one buffer, of which a piece is reduced as soon as the last backward pass has
    completed it, while the pass goes on. As the order of each sum is fixed, a resumed run is
    bitwise the same; and the reduction can be captured in a CUDA graph. DistributedDataParallel
    rearranges the gradients after its first step, so it has neither property.
    """

    def __init__(self, model: GPT, precision: str, group: Group):
        super().__init__(model, precision)
        self._group = group
        self._is_first = self._is_last = True
        self._pending: list[Any] = []  # reductions that have been started
        names = [name for name, _ in model.named_parameters()]
        found = list(zip(names, self.parameters, self.compute_model.parameters(), strict=True))
        self._layers = _thirds(model.params.n_layer)
        total = sum(p.numel() for p in self.parameters)
        self._buffer = torch.zeros(total + 1, device=self.device)  # the last element is the loss
        end = 0
        groups: list[Callable[[str], bool]] = [partial(_is_in, each) for each in self._layers]
        for belongs in [*groups, _is_embedding]:
            pairs = [(p, copied) for name, p, copied in found if belongs(name)]
            start = end
            for p, _ in pairs:
                p.grad = self._buffer[end : end + p.numel()].view_as(p)
                end += p.numel()
            last = end + 1 if belongs is _is_embedding else end
            piece = _Piece(self._buffer[start:last], pairs, len(pairs))
            for _, copied in pairs:
                copied.register_post_accumulate_grad_hook(partial(self._complete, piece))
        assert end == total

    def compile(self) -> None:
        super().compile()
        if self.compiled:
            self.compute_model.compile(self._layers, fullgraph=True, dynamic=False)

    def begin(self, loss: torch.Tensor, is_first: bool, is_last: bool) -> None:
        self._is_first, self._is_last = is_first, is_last
        self._buffer[-1] = loss

    def collect(self) -> None:
        if not self._is_last:
            super().collect()

    def _complete(self, piece: "_Piece", _: torch.Tensor) -> None:
        """Reduce a piece of the gradients once all of its parameters have got theirs."""
        if not self._is_last:
            return
        piece.missing = (piece.missing or len(piece.pairs)) - 1
        if piece.missing == 0:
            if self.is_half:
                self._add(piece.pairs)
            self._pending.append(self._group.start_sum(piece.buffer))

    def reduce(self, loss: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        for reduction in self._pending:
            reduction.wait()
        self._pending.clear()
        return self._buffer[-1].clone(), torch.nn.utils.get_total_norm(self.gradients)

    def finish(self) -> None:
        if self.is_half:
            self.sync_from_master()
        else:
            self._buffer.zero_()


@dataclass
class _Piece:
    """Parameters whose gradients are reduced together."""

    buffer: torch.Tensor  # their gradients, flat
    pairs: list[Pair]
    missing: int  # number of parameters without a gradient in this pass


def _thirds(blocks: int) -> list[slice]:
    """Which blocks are compiled and reduced together. With more pieces, the later ones would have
    more time to be reduced, but each would take longer."""
    bounds = sorted({blocks * n // 3 for n in range(3)})
    return [slice(a, b) for a, b in zip(bounds, [*bounds[1:], None], strict=True)]


def _is_in(layers: slice, name: str) -> bool:
    """Whether a parameter belongs to these blocks; the final layer norm belongs to the last."""
    if ".ln_f." in name:
        return layers.stop is None
    number = int(name.split(".")[2]) if ".h." in name else -1
    return number >= layers.start and (layers.stop is None or number < layers.stop)


def _is_embedding(name: str) -> bool:
    return ".wte." in name or ".wpe." in name


def place(model: GPT, precision: str, p: TrainParams, group: Group) -> Weights:
    """Place the weights as train.parallel requests. All processes must pass the same weights."""
    if group.count == 1:
        return Weights(model, precision)
    if p.parallel == "none":
        raise UserError(
            f"train.parallel is none, but {group.count} processes were started: set it to auto, ddp"
            " or fsdp, or start one"
        )
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
