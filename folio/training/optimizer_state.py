"""The state of an optimizer as numbered tensors and JSON, and back.

This is the state that `Optimizer.state_dict` returns, so attributes of an optimizer are not in it.
It may contain dense tensors, None, bool, int, float and str, and dicts, lists and tuples of these.
A tensor that occurs more than once is saved once and restored as one tensor; different tensors must
not overlap in memory. Anything that would not be the same after a resume is rejected.
"""

from itertools import pairwise
from typing import Any

import torch

from folio.errors import UserError

# Options of a parameter group that depend on the machine or that are set in every step.
_NOT_SAVED = {"params", "lr", "fused", "foreach", "capturable", "differentiable"}

_MAX_DEPTH = 50  # of nested dicts, lists and tuples; json and PyTorch process them recursively
_PLAIN = (type(None), bool, int, float, str)
_DTYPES = {  # of safetensors
    *(torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.complex64, torch.bool),
    *(torch.float8_e4m3fn, torch.float8_e4m3fnuz, torch.float8_e5m2, torch.float8_e5m2fnuz),
    *(torch.int64, torch.int32, torch.int16, torch.int8),
    *(torch.uint64, torch.uint32, torch.uint16, torch.uint8),
}
_CPU = torch.device("cpu")


def save(optimizer: torch.optim.Optimizer) -> tuple[dict[str, torch.Tensor], Any]:
    """Return the tensors of the optimizer's state by number, and the rest as JSON that refers to
    them. Does not wait for the device.

    Tensors on the CPU, if the parameters are on another device, are called `cpu.` and the number.
    Raises UserError if the state contains anything that a checkpoint cannot.
    """
    encoder = _Encoder(optimizer)
    state = optimizer.state_dict()
    groups = [
        {key: value for key, value in group.items() if key not in _NOT_SAVED}
        for group in state["param_groups"]
    ]
    rest = [encoder.encode(state["state"], "state"), encoder.encode(groups, "param_groups")]
    encoder.reject_overlaps()
    return encoder.tensors, {"list": rest}


def restore(optimizer: torch.optim.Optimizer, tensors: dict[str, torch.Tensor], rest: Any) -> None:
    """Restore what `save` returned, in an optimizer of the same type with the same parameters.

    PyTorch's load_state_dict casts the state's tensors to the dtype of the parameters, which would
    break step counters. It also changes strings in the state, and copies tensors in the groups. So
    everything is set again afterwards.
    """
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    device = parameters[0].device
    placed = {name: t if name.startswith("cpu.") else t.to(device) for name, t in tensors.items()}
    state, saved_groups = _decode(rest, placed)
    groups = optimizer.state_dict()["param_groups"]
    for group, saved in zip(groups, saved_groups, strict=True):
        group.update(saved)
    optimizer.load_state_dict({"state": state, "param_groups": groups})
    for group, saved in zip(optimizer.param_groups, saved_groups, strict=True):
        group.update(saved)
    for index, p in enumerate(parameters):
        if index in state:
            optimizer.state[p] = state[index]


class _Encoder:
    def __init__(self, optimizer: torch.optim.Optimizer):
        self.optimizer = type(optimizer).__name__
        self.parameters = [p for group in optimizer.param_groups for p in group["params"]]
        self.tensors: dict[str, torch.Tensor] = {}
        self.names: dict[int, str] = {}  # by the id of a tensor
        self.paths: dict[str, str] = {}  # of the tensors by name, for messages

    def encode(self, value: Any, path: str, depth: int = 0) -> Any:
        """Return the value as JSON. Adds the tensors in it to self.tensors."""
        if depth > _MAX_DEPTH:
            raise self._error(path[:40] + "...", f"is nested more than {_MAX_DEPTH} levels deep")
        if isinstance(value, torch.Tensor):
            return {"tensor": self._add(value, path)}
        if type(value) in _PLAIN:
            return value
        if type(value) is dict:
            for key in value:
                if type(key) not in _PLAIN:
                    raise self._error(path, f"has a key of type {type(key).__name__}")
            items = value.items()
            return {"dict": [[k, self.encode(v, f"{path}[{k!r}]", depth + 1)] for k, v in items]}
        if type(value) in (list, tuple):
            encoded = [self.encode(v, f"{path}[{i}]", depth + 1) for i, v in enumerate(value)]
            return {type(value).__name__: encoded}
        raise self._error(path, f"has type {type(value).__name__}")

    def _add(self, tensor: torch.Tensor, path: str) -> str:
        if id(tensor) not in self.names:
            device = self.parameters[0].device
            if problem := _problem(tensor, device):
                raise self._error(path, problem)
            prefix = "cpu." if tensor.device != device else ""
            name = self.names[id(tensor)] = f"{prefix}{len(self.tensors)}"
            self.tensors[name] = tensor.resolve_conj().resolve_neg()
            self.paths[name] = path
        return self.names[id(tensor)]

    def reject_overlaps(self) -> None:
        """Raise UserError if two tensors share memory: after a resume, they would not.

        Interleaved tensors, such as two columns of one matrix, are rejected too.
        """
        named = [(self.paths[name], tensor) for name, tensor in self.tensors.items()]
        named += [("a parameter", p) for p in self.parameters]
        spans = sorted((*_span(tensor), path) for path, tensor in named if tensor.numel())
        for (storage, _, end, path), (other_storage, start, _, other) in pairwise(spans):
            if storage == other_storage and start < end:
                raise self._error(path, f"shares memory with {other}")

    def _error(self, path: str, problem: str) -> UserError:
        return UserError(
            f"checkpoints cannot contain the state of the optimizer {self.optimizer}: {path}"
            f" {problem}; folio/training/optimizer_state.py describes what they can contain"
        )


def _problem(tensor: torch.Tensor, device: torch.device) -> str | None:
    """Why the tensor cannot be saved and restored unchanged. device: that of the parameters."""
    if type(tensor) is not torch.Tensor:
        return f"has type {type(tensor).__name__}"
    if tensor.layout is not torch.strided or tensor.is_nested:
        return "is not a dense tensor"
    if tensor.dtype not in _DTYPES:
        return f"has dtype {tensor.dtype}"
    if tensor.device not in (_CPU, device):
        return f"is on the device {tensor.device}"
    return "requires a gradient" if tensor.requires_grad else None


def _span(tensor: torch.Tensor) -> tuple[int, int, int]:
    """The address of the tensor's storage, and where its elements begin and end there, in bytes."""
    steps = zip(tensor.shape, tensor.stride(), strict=True)
    first = int(tensor.storage_offset())
    end = first + 1 + sum(int((size - 1) * stride) for size, stride in steps)
    size = tensor.element_size()
    return tensor.untyped_storage().data_ptr(), first * size, end * size


def _decode(value: Any, tensors: dict[str, torch.Tensor]) -> Any:
    if not isinstance(value, dict):
        return value
    [(kind, content)] = value.items()
    if kind == "tensor":
        return tensors[content]
    if kind == "dict":
        return {key: _decode(v, tensors) for key, v in content}
    items = [_decode(v, tensors) for v in content]
    return tuple(items) if kind == "tuple" else items
