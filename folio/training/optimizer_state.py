"""The state of any optimizer as tensors and JSON, and back.

`Optimizer.state_dict` may have tensors of any shape and type, numbers, None, and nested dicts,
lists and tuples of these.
"""

from typing import Any

import torch

# Options of a parameter group that depend on the machine, or that every step sets anew.
_NOT_SAVED = {"params", "lr", "fused", "foreach", "capturable", "differentiable"}


def save(optimizer: torch.optim.Optimizer) -> tuple[dict[str, torch.Tensor], Any]:
    """The tensors of the optimizer's state by name, and the rest as JSON that refers to them."""
    state = optimizer.state_dict()
    groups = [
        {key: value for key, value in group.items() if key not in _NOT_SAVED}
        for group in state["param_groups"]
    ]
    tensors: dict[str, torch.Tensor] = {}
    return tensors, _flatten([state["state"], groups], "", tensors)


def restore(optimizer: torch.optim.Optimizer, tensors: dict[str, torch.Tensor], rest: Any) -> None:
    """Put back what `save` returned, into an optimizer of the same kind over the same parameters.

    PyTorch's load_state_dict moves the tensors to the parameters' device, and casts them to the
    parameters' type, which would change a counter; so the original type is restored afterwards.
    """
    state, saved_groups = _unflatten(rest, tensors)
    groups = optimizer.state_dict()["param_groups"]
    for group, saved in zip(groups, saved_groups, strict=True):
        group.update(saved)
    optimizer.load_state_dict({"state": state, "param_groups": groups})
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    for index, saved in state.items():
        if index in range(len(parameters)):
            slots = optimizer.state[parameters[index]]
            for name, value in saved.items():
                loaded = slots[name]
                if isinstance(value, torch.Tensor) and value.dtype != loaded.dtype:
                    slots[name] = value.to(loaded.device)


def _flatten(value: Any, name: str, tensors: dict[str, torch.Tensor]) -> Any:
    if isinstance(value, torch.Tensor):
        tensors[name] = value
        return {"tensor": name}
    if isinstance(value, dict):
        return {
            "dict": [
                [key, _flatten(v, f"{name}.{key}".strip("."), tensors)] for key, v in value.items()
            ]
        }
    if isinstance(value, list | tuple):
        items = [_flatten(v, f"{name}.{i}".strip("."), tensors) for i, v in enumerate(value)]
        return {type(value).__name__: items}
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise TypeError(f"the optimizer's state {name} is of type {type(value).__name__}")


def _unflatten(value: Any, tensors: dict[str, torch.Tensor]) -> Any:
    if not isinstance(value, dict):
        return value
    [(kind, content)] = value.items()
    if kind == "tensor":
        return tensors[content]
    if kind == "dict":
        return {key: _unflatten(v, tensors) for key, v in content}
    items = [_unflatten(v, tensors) for v in content]
    return tuple(items) if kind == "tuple" else items
