"""The complete training state on disk: written atomically, read safely, never pickled.

A variant's folder holds one folder a checkpoint, `step-00000500/`, with `state.safetensors` (every
tensor, and what is not a tensor as JSON in its header) and `sha256`.
"""

import hashlib
import json
import os
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import filelock
import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open

from folio.errors import UserError


@dataclass(frozen=True)
class Checkpoint:
    step: int  # updates done
    tensors: dict[str, torch.Tensor]  # model.*, optimizer.*, rng.*
    state: dict[str, Any]  # all that is not a tensor, as JSON has it


@contextmanager
def only_trainer(folder: Path) -> Iterator[None]:
    """Keep a second trainer off the same checkpoints. Raises UserError where one is at work."""
    folder.mkdir(parents=True, exist_ok=True)
    lock = filelock.FileLock(folder.with_suffix(".lock"), blocking=False)
    try:
        lock.acquire()
    except filelock.Timeout:
        raise UserError(
            f"another process is training this variant ({folder.name}):"
            " wait for it, or end it and run again"
        ) from None
    try:
        yield
    finally:
        lock.release()


def capture(
    model: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler,
) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """The tensors and the rest of what the next step depends on, besides its number."""
    tensors = {f"model.{name}": t for name, t in model.state_dict().items()}
    for index, slots in optimizer.state_dict()["state"].items():
        tensors |= {f"optimizer.{index}.{name}": t for name, t in slots.items()}
    tensors["rng.cpu"] = torch.get_rng_state()
    if torch.cuda.is_available():
        tensors["rng.cuda"] = torch.cuda.get_rng_state()
    return tensors, {"scaler": scaler.state_dict()}


def restore(
    checkpoint: Checkpoint,
    model: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler,
) -> None:
    """Put back what capture took. Raises UserError if it is another model's."""
    restore_model(checkpoint, model)
    slots: dict[int, dict[str, torch.Tensor]] = {}
    for name, tensor in checkpoint.tensors.items():
        part, _, rest = name.partition(".")
        if part == "optimizer":
            index, _, slot = rest.partition(".")
            slots.setdefault(int(index), {})[slot] = tensor
    groups = optimizer.state_dict()["param_groups"]
    optimizer.load_state_dict({"state": slots, "param_groups": groups})
    scaler.load_state_dict(checkpoint.state["scaler"])
    torch.set_rng_state(checkpoint.tensors["rng.cpu"])
    if torch.cuda.is_available() and "rng.cuda" in checkpoint.tensors:
        torch.cuda.set_rng_state(checkpoint.tensors["rng.cuda"])


def restore_model(checkpoint: Checkpoint, model: torch.nn.Module) -> None:
    """The weights alone. Raises UserError if they are another model's."""
    weights = {
        name.removeprefix("model."): tensor
        for name, tensor in checkpoint.tensors.items()
        if name.startswith("model.")
    }
    try:
        model.load_state_dict(weights)
    except RuntimeError:
        raise UserError(
            f"the checkpoint of step {checkpoint.step} is of another model (the code has changed):"
            " remove .checkpoints to start anew"
        ) from None


def save(folder: Path, checkpoint: Checkpoint, keep: set[int]) -> None:
    """Write a checkpoint, then remove all but it, the one before it and those of the steps in keep.

    A kill or a full disk at any moment leaves the checkpoints that were there.
    """
    place = _place(folder, checkpoint.step)
    temporary = place.with_suffix(".tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        tensors = {name: t.detach().cpu().contiguous() for name, t in checkpoint.tensors.items()}
        content = safetensors.torch.save(tensors, {"state": json.dumps(checkpoint.state)})
        (temporary / "state.safetensors").write_bytes(content)
        (temporary / "sha256").write_text(hashlib.sha256(content).hexdigest())
        for file in temporary.iterdir():
            _fsync(file)
        _fsync(temporary)
        shutil.rmtree(place, ignore_errors=True)
        temporary.rename(place)
        _fsync(folder)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    before = [step for step in steps(folder) if step < checkpoint.step]
    for step in set(steps(folder)) - {checkpoint.step, *before[-1:], *keep}:
        shutil.rmtree(_place(folder, step))


def load(folder: Path, step: int) -> Checkpoint:
    """Raises UserError if there is none of that step or it is damaged."""
    place = _place(folder, step)
    try:
        if (place / "sha256").read_text() != _sha256(place / "state.safetensors"):
            raise ValueError("its checksum does not match")
        with safe_open(place / "state.safetensors", framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            state = json.loads(file.metadata()["state"])
    except (OSError, ValueError, SafetensorError) as problem:
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
    return sorted(
        int(place.name.removeprefix("step-"))
        for place in folder.glob("step-*")
        if place.suffix != ".tmp"
    )


def _place(folder: Path, step: int) -> Path:
    return folder / f"step-{step:08d}"


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
