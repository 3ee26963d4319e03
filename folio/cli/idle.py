"""Keeps dvc and training runs from changing the project while something is removed from it."""

import contextlib
import fcntl
import json
from collections.abc import Iterator
from pathlib import Path

import psutil

from folio.cli.project_checks import RWLOCKS, dvc_processes, users
from folio.errors import UserError
from folio.run import is_training
from folio.sweeps import queue
from folio.tracking.garbage import Garbage


@contextlib.contextmanager
def project(root: Path) -> Iterator[None]:
    """Hold DVC's lock within the block, so that every dvc command waits or fails.

    Raises UserError if a training run, a dvc command or the queue is running. While a stage runs,
    DVC itself only keeps a list of the files that the stage uses (rwlock).
    """
    lock = root / ".dvc/tmp/lock"
    if not (root / ".dvc").is_dir():
        _refuse_if_busy(root)
        yield
        return
    lock.parent.mkdir(exist_ok=True)
    with lock.open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # as DVC does
        except OSError:
            raise UserError(_busy("a dvc command is running")) from None
        _refuse_if_busy(root)
        yield


def leave_out_copies(found: Garbage, root: Path) -> None:
    """If a training run, a dvc command or the queue is running, leave out the copies of the project
    in .dvc/tmp, in one of which it may run, and add a note."""
    if reason := _reason(root):
        found.temporary = []
        found.notes.append(f"{reason}: until it has finished, `gc` frees nothing")


def _refuse_if_busy(root: Path) -> None:
    if reason := _reason(root):
        raise UserError(_busy(reason))


def _reason(root: Path) -> str:
    """What is running in the project; empty if nothing is."""
    if is_training(root):
        return "a training run is going on"
    if queue.count_workers():
        return "DVC's queue is running (`dvc queue status`)"
    if pids := {*dvc_processes(), *_pids(root)}:
        return f"dvc is running (process {min(pids)})"
    return ""


def _busy(reason: str) -> str:
    return f"{reason}: wait until it has finished, or stop it"


def _pids(root: Path) -> set[int]:
    """The processes in DVC's lists of used files that still exist."""
    found = set()
    for name in RWLOCKS:
        with contextlib.suppress(OSError, ValueError, TypeError, KeyError, AttributeError):
            found |= {int(each["pid"]) for each in users(json.loads((root / name).read_text()))}
    return {pid for pid in found if psutil.pid_exists(pid)}
