"""The complete training state on disk: written atomically, read safely, never pickled.

A variant's folder holds a folder for each checkpoint, `step-00000500/`, with `state.safetensors`
(every tensor, and what is not a tensor as JSON in its header) and `sha256`.
"""

import hashlib
import json
import os
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open

from folio import files
from folio.errors import UserError


class Stateful(Protocol):
    """What step.Step is to a checkpoint."""

    def state_dict(self) -> dict[str, torch.Tensor]: ...

    def load_state_dict(self, state: dict[str, torch.Tensor]) -> None: ...


@dataclass(frozen=True)
class Checkpoint:
    step: int  # updates done
    tensors: dict[str, torch.Tensor]  # model.*, optimizer.*, step.*, best.*
    state: dict[str, Any]  # all that is not a tensor, as JSON has it


def remove(folder: Path) -> None:
    """Remove a variant's checkpoints, then what tells which run they are of. See lock.idle."""
    for step in steps(folder):
        _remove(_place(folder, step))
    shutil.rmtree(folder)


def capture(
    model: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    step: Stateful,
) -> dict[str, torch.Tensor]:
    """What the next step depends on, besides its number."""
    tensors = {f"model.{name}": t for name, t in model.state_dict().items()}
    for index, slots in optimizer.state_dict()["state"].items():
        tensors |= {f"optimizer.{index}.{name}": t for name, t in slots.items()}
    return tensors | {f"step.{name}": t for name, t in step.state_dict().items()}


def restore(
    checkpoint: Checkpoint,
    model: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    step: Stateful,
) -> None:
    """Put back what capture took. Raises UserError if it is another model's."""
    restore_model(checkpoint, model)
    slots: dict[int, dict[str, torch.Tensor]] = {}
    for name, tensor in part(checkpoint, "optimizer").items():
        index, _, slot = name.partition(".")
        slots.setdefault(int(index), {})[slot] = tensor
    groups = optimizer.state_dict()["param_groups"]
    optimizer.load_state_dict({"state": slots, "param_groups": groups})
    step.load_state_dict(part(checkpoint, "step"))


def restore_model(checkpoint: Checkpoint, model: torch.nn.Module) -> None:
    """The weights alone. Raises UserError if they are another model's."""
    try:
        model.load_state_dict(part(checkpoint, "model"))
    except RuntimeError:
        raise UserError(
            f"the checkpoint of step {checkpoint.step} is of another model (the code has changed):"
            " remove .checkpoints to start anew"
        ) from None


def save(folder: Path, checkpoint: Checkpoint) -> None:
    """Write a checkpoint, then remove all but it and the one before it.

    A kill or a full disk at any moment leaves the checkpoints that were there (but for one of the
    same step, which gives way at the very end).
    """
    for left in folder.glob("step-*.tmp"):  # by a kill
        shutil.rmtree(left)
    place = _place(folder, checkpoint.step)
    temporary = place.with_suffix(".new.tmp")
    temporary.mkdir(parents=True)
    try:
        tensors = {name: t.detach().cpu().contiguous() for name, t in checkpoint.tensors.items()}
        header = {"step": str(checkpoint.step), "state": json.dumps(checkpoint.state)}
        content = safetensors.torch.save(tensors, header)
        (temporary / "state.safetensors").write_bytes(content)
        (temporary / "sha256").write_text(hashlib.sha256(content).hexdigest())
        for file in temporary.iterdir():
            _fsync(file)
        _fsync(temporary)
        _remove(place)
        temporary.rename(place)
        _fsync(folder)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    before = [step for step in steps(folder) if step < checkpoint.step]
    for step in set(steps(folder)) - {checkpoint.step, *before[-1:]}:
        _remove(_place(folder, step))


def load(folder: Path, step: int) -> Checkpoint:
    """Raises UserError if there is none of that step or it is damaged."""
    place = _place(folder, step)
    try:
        if (place / "sha256").read_text() != files.sha256(place / "state.safetensors"):
            raise ValueError("its checksum does not match")
        with safe_open(place / "state.safetensors", framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            header = file.metadata()
        if int(header["step"]) != step:
            raise ValueError(f"it is of step {header['step']}")
        state = json.loads(header["state"])
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as problem:
        raise UserError(f"checkpoint {place} is damaged: {problem}") from None
    return Checkpoint(step, tensors, state)


def load_latest(folder: Path) -> Checkpoint | None:
    """The newest checkpoint that is whole, or None where there is none at all.

    A damaged one is named on stderr and passed over. Raises UserError if all of them are damaged.
    """
    found = steps(folder)
    for step in reversed(found):
        try:
            return load(folder, step)
        except UserError as problem:
            print(f"{problem}; passing it over", file=sys.stderr)
    if found:
        raise UserError(f"every checkpoint in {folder} is damaged: remove it to start anew")
    return None


def steps(folder: Path) -> list[int]:
    """The steps of which there are checkpoints, oldest first."""
    names = [place.name.removeprefix("step-") for place in folder.glob("step-*")]
    return sorted(int(name) for name in names if name.isdigit())


def part(checkpoint: Checkpoint, name: str) -> dict[str, torch.Tensor]:
    """The tensors called `name.*`, without the name."""
    return {
        key.removeprefix(f"{name}."): tensor
        for key, tensor in checkpoint.tensors.items()
        if key.startswith(f"{name}.")
    }


def _place(folder: Path, step: int) -> Path:
    return folder / f"step-{step:08d}"


def _remove(place: Path) -> None:
    """Remove a checkpoint in such a way that a kill leaves no half of one under its name."""
    if place.exists():
        shutil.rmtree(place.rename(place.with_suffix(".old.tmp")))


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
