"""The complete training state on disk: written atomically, verified when read, never pickled.

The folder of a training run has a subfolder per checkpoint, such as `step-00000500/`, which
contains `state.safetensors` (every tensor, and everything else as JSON in its header) and `sha256`.
If the weights are sharded, the tensors that are divided by rows are in the folder `shards`.
"""

import contextlib
import json
import os
import shutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open

from folio import files
from folio.distributed import ONE_PROCESS, Group
from folio.errors import UserError

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

_STATE, _SUMS, _SHARDS = "state.safetensors", "sha256", "shards"


@dataclass(frozen=True)
class Checkpoint:
    step: int  # number of updates so far
    tensors: dict[str, torch.Tensor]  # by name: model.*, optimizer.*, step.*, best.*
    state: dict[str, Any]  # everything that is not a tensor, as JSON
    # The tensors that are divided by rows if the weights are sharded, with the number of their rows
    # in all processes together. `tensors` has the rows of this process.
    rows: dict[str, int] = field(default_factory=dict)

    def part(self, name: str) -> dict[str, torch.Tensor]:
        """The tensors called `name.*`, without that prefix."""
        return {
            key.removeprefix(f"{name}."): tensor
            for key, tensor in self.tensors.items()
            if key.startswith(f"{name}.")
        }


def save(
    folder: Path,
    checkpoint: Checkpoint,
    group: Group = ONE_PROCESS,
    mesh: "DeviceMesh | None" = None,
) -> None:
    """Write a checkpoint, then remove all others except the one before it. Collective.

    If a process is killed or the disk fills up, existing checkpoints stay intact (except one of
    the same step, which is replaced at the very end).
    mesh: of sharded weights. Without one, the main process alone writes.
    """
    place = _place(folder, checkpoint.step)
    temporary = place.with_suffix(".new.tmp")
    whole, parts = checkpoint.tensors, {}
    if mesh:
        parts = {name: whole[name] for name in checkpoint.rows}
        whole = {name: tensor for name, tensor in whole.items() if name not in parts}
    try:
        with files.naming(place), group.agreeing():
            if group.is_main:
                for leftover in folder.glob("step-*.tmp"):  # from a process that was killed
                    shutil.rmtree(leftover)
                temporary.mkdir(parents=True)
        if mesh:
            from folio.training import sharded_checkpoint  # importing it takes a second

            with files.naming(place), group.agreeing():
                sharded_checkpoint.save(temporary / _SHARDS, parts, checkpoint.rows, mesh)
        with files.naming(place), group.agreeing():
            if group.is_main:
                _write_state(temporary, whole, checkpoint)
                _finish(temporary, place)
    except BaseException:
        if group.is_main:
            shutil.rmtree(temporary, ignore_errors=True)
        raise
    if group.is_main:
        before = [step for step in steps(folder) if step < checkpoint.step]
        for step in set(steps(folder)) - {checkpoint.step, *before[-1:]}:
            files.remove_folder(_place(folder, step))


def load(folder: Path, step: int, mesh: "DeviceMesh | None" = None) -> Checkpoint:
    """Load the checkpoint of a step. Raises UserError if it is missing or damaged.

    With the mesh of sharded weights: collective, and of what is divided by rows, only the rows of
    this process are loaded, whatever the number of processes that saved it.
    """
    place = _place(folder, step)
    with _damage_reported(place):
        _verify(place)
        return _read(place, step, mesh)


def load_latest(
    folder: Path, group: Group = ONE_PROCESS, mesh: "DeviceMesh | None" = None
) -> Checkpoint | None:
    """Load the newest undamaged checkpoint. Returns None if there are no checkpoints. Collective.

    A damaged one is reported on stderr and skipped. It is renamed to, for example,
    `step-00000500.damaged`, so that `save` does not keep it instead of an undamaged one. If all of
    them are damaged, none is renamed and UserError is raised.
    """
    with group.agreeing():
        found = _find_undamaged(folder) if group.is_main else None
    step = group.from_main(found)
    if step is None:
        return None
    with group.agreeing(), _damage_reported(_place(folder, step)):
        return _read(_place(folder, step), step, mesh)


def _find_undamaged(folder: Path) -> int | None:
    """The newest step whose checkpoint is undamaged; None if there are no checkpoints."""
    damaged: list[Path] = []
    for step in reversed(steps(folder)):
        place = _place(folder, step)
        try:
            with _damage_reported(place):
                _verify(place)
                _read_header(place, step)
        except UserError as problem:
            print(f"{problem}; skipping it", file=sys.stderr)
            damaged.append(place)
            continue
        for each in damaged:
            renamed = each.with_suffix(".damaged")
            files.remove_folder(renamed)  # from an earlier resume
            each.rename(renamed)
        return step
    if damaged:
        raise UserError(f"every checkpoint in {folder} is damaged: remove it to start over")
    return None


@contextlib.contextmanager
def _damage_reported(place: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as problem:
        if isinstance(problem, UserError):
            raise
        raise UserError(f"checkpoint {place} is damaged: {problem}") from None


def _verify(place: Path) -> None:
    """Raise ValueError or OSError unless the files of a checkpoint match their checksums."""
    lines = [line.split("  ") for line in (place / _SUMS).read_text().splitlines()]
    sums = {name: digest for digest, name in lines}
    if _STATE not in sums or sums.keys() != set(_tensor_files(place)):
        raise ValueError("a file is missing")
    if any(files.sha256(place / name) != digest for name, digest in sums.items()):
        raise ValueError("its checksum does not match")


def _read_header(place: Path, step: int) -> tuple[dict[str, Any], dict[str, int]]:
    """The state and the rows of a Checkpoint."""
    with safe_open(place / _STATE, framework="pt") as file:
        header = file.metadata()
    if int(header["step"]) != step:
        raise ValueError(f"it belongs to step {header['step']}")
    return json.loads(header["state"]), json.loads(header["rows"])


def _read(place: Path, step: int, mesh: "DeviceMesh | None") -> Checkpoint:
    state, rows = _read_header(place, step)
    tensors = {}
    with safe_open(place / _STATE, framework="pt") as file:
        for name in file.keys():  # noqa: SIM118
            if mesh and name in rows:
                from folio.training.sharded_checkpoint import local_rows

                tensors[name] = file.get_slice(name)[local_rows(rows[name], mesh)]
            else:
                tensors[name] = file.get_tensor(name)
    if rows.keys() - tensors.keys():
        from folio.training import sharded_checkpoint

        tensors |= sharded_checkpoint.load(place / _SHARDS, mesh)
    return Checkpoint(step, tensors, state, rows)


def _write_state(place: Path, tensors: dict[str, torch.Tensor], checkpoint: Checkpoint) -> None:
    """Write the tensors, and as JSON in the header of their file, everything else."""
    header = {
        "step": str(checkpoint.step),
        "state": json.dumps(checkpoint.state),
        "rows": json.dumps(checkpoint.rows),
    }
    tensors = {name: t.detach().cpu().contiguous() for name, t in tensors.items()}
    (place / _STATE).write_bytes(safetensors.torch.save(tensors, header))


def _finish(temporary: Path, place: Path) -> None:
    """Write the checksums, make everything durable and rename the folder to its final name."""
    sums = [f"{files.sha256(temporary / name)}  {name}\n" for name in _tensor_files(temporary)]
    (temporary / _SUMS).write_text("".join(sums))
    for path in (*temporary.rglob("*"), temporary):
        _fsync(path)
    files.remove_folder(place)
    temporary.rename(place)
    _fsync(place.parent)


def _tensor_files(place: Path) -> list[str]:
    """The paths of the files in a checkpoint's folder, relative to it."""
    found = place.rglob("*.safetensors")
    return sorted(file.relative_to(place).as_posix() for file in found)


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
