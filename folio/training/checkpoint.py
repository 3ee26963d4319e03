"""The complete training state on disk: written atomically, verified when read, never pickled.

The folder of a training run has a subfolder per checkpoint, such as `step-00000500/`, which
contains `state.safetensors` (every tensor, and everything else as JSON in its header) and `sha256`.
"""

import hashlib
import json
import os
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open

from folio import files
from folio.errors import UserError


@dataclass(frozen=True)
class Checkpoint:
    step: int  # number of updates so far
    tensors: dict[str, torch.Tensor]  # by name: model.*, optimizer.*, step.*, best.*
    state: dict[str, Any]  # everything that is not a tensor, as JSON

    def part(self, name: str) -> dict[str, torch.Tensor]:
        """The tensors called `name.*`, without that prefix."""
        return {
            key.removeprefix(f"{name}."): tensor
            for key, tensor in self.tensors.items()
            if key.startswith(f"{name}.")
        }


def save(folder: Path, checkpoint: Checkpoint) -> None:
    """Write a checkpoint, then remove all others except the one before it.

    If the process is killed or the disk fills up, existing checkpoints stay intact (except one of
    the same step, which is replaced at the very end).
    """
    for leftover in folder.glob("step-*.tmp"):  # from a process that was killed
        shutil.rmtree(leftover)
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
        files.remove_folder(place)
        temporary.rename(place)
        _fsync(folder)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    before = [step for step in steps(folder) if step < checkpoint.step]
    for step in set(steps(folder)) - {checkpoint.step, *before[-1:]}:
        files.remove_folder(_place(folder, step))


def load(folder: Path, step: int) -> Checkpoint:
    """Load the checkpoint of a step. Raises UserError if it is missing or damaged."""
    place = _place(folder, step)
    try:
        if (place / "sha256").read_text() != files.sha256(place / "state.safetensors"):
            raise ValueError("its checksum does not match")
        with safe_open(place / "state.safetensors", framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            header = file.metadata()
        if int(header["step"]) != step:
            raise ValueError(f"it belongs to step {header['step']}")
        state = json.loads(header["state"])
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as problem:
        raise UserError(f"checkpoint {place} is damaged: {problem}") from None
    return Checkpoint(step, tensors, state)


def load_latest(folder: Path) -> Checkpoint | None:
    """Load the newest undamaged checkpoint. Returns None if there are no checkpoints.

    A damaged one is reported on stderr and skipped. It is renamed to, for example,
    `step-00000500.damaged`, so that `save` does not keep it instead of an undamaged one. If all of
    them are damaged, none is renamed and UserError is raised.
    """
    found = steps(folder)
    damaged = []
    for step in reversed(found):
        try:
            checkpoint = load(folder, step)
        except UserError as problem:
            print(f"{problem}; skipping it", file=sys.stderr)
            damaged.append(_place(folder, step))
            continue
        for place in damaged:
            renamed = place.with_suffix(".damaged")
            files.remove_folder(renamed)  # from an earlier resume
            place.rename(renamed)
        return checkpoint
    if found:
        raise UserError(f"every checkpoint in {folder} is damaged: remove it to start over")
    return None


def steps(folder: Path) -> list[int]:
    """The steps for which there is a checkpoint, oldest first."""
    names = [place.name.removeprefix("step-") for place in folder.glob("step-*")]
    return sorted(int(name) for name in names if name.isdigit())


def _place(folder: Path, step: int) -> Path:
    return folder / f"step-{step:08d}"


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
