"""A run as files: record.json, history.jsonl, and the working folder of an unfinished training.

The train stage writes a record beside its history, and evaluate one beside its metrics. DVC keeps
both, so a run that comes out of its cache, or from another machine, can be written to any MLflow
store at any later time (folio/tracking/sync.py).
"""

import dataclasses
import json
import os
import shutil
import sys
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import filelock

from folio import files
from folio.errors import UserError

TRAINING = Path("models/training")
EVALUATION = Path("models/evaluation")
RECORD = "record.json"  # in both folders
HISTORY = "history.jsonl"  # in TRAINING
UNFINISHED = ".checkpoints"  # a folder for each unfinished training, by its train_key


@dataclass(frozen=True, kw_only=True)
class Record:
    id: str  # assigned by Folio, the same in every store: the tag folio_id
    name: str
    started: int  # ms since 1970
    ended: int | None = None
    parent: str | None = None  # of an evaluation: the id of its training
    params: dict[str, str]
    tags: dict[str, str]


@dataclass(frozen=True, kw_only=True)
class Run:
    """A record, and everything else about a run that is sent to MLflow."""

    record: Record
    history: list[dict[str, Any]] = field(default_factory=list)  # rows: step, time (ms), metrics
    summary: dict[str, float] = field(default_factory=dict)  # metrics of the whole run
    files: list[tuple[Path, str]] = field(default_factory=list)  # (file or folder, artifact folder)
    parent_files: list[tuple[Path, str]] = field(default_factory=list)  # the same, for the parent
    model: Path | None = None  # a Hugging Face folder


def project_root() -> Path:
    """The folder of the MLflow store and of unfinished trainings: DVC's root, even where DVC runs
    an experiment in a copy of the project."""
    return Path(os.environ.get("DVC_ROOT") or Path.cwd()).resolve()


def run_name(name: str) -> str:
    """The name, preceded by the name of the DVC experiment, if the run belongs to one."""
    return " ".join(filter(None, [os.environ.get("DVC_EXP_NAME"), name]))


def now_ms() -> int:
    """Milliseconds since 1970, the unit of MLflow's timestamps."""
    return time.time_ns() // 1_000_000


def new_id() -> str:
    return uuid.uuid4().hex


def write_record(record: Record, path: Path) -> None:
    files.write_text(path, json.dumps(dataclasses.asdict(record), indent=2) + "\n")


def read_record(path: Path) -> Record:
    """Raises UserError if the file is missing or damaged."""
    try:
        return parse_record(path.read_bytes(), path)
    except OSError:
        raise _damaged(path) from None


def parse_record(content: bytes, path: Path) -> Record:
    """The record in a file's content. Raises UserError, naming the path, if it is damaged."""
    try:
        record = Record(**json.loads(content))
        if not isinstance(record.id, str) or not all(
            isinstance(texts, dict) for texts in (record.params, record.tags)
        ):
            raise TypeError
        return record
    except (ValueError, TypeError, RecursionError):
        raise _damaged(path) from None


def write_history(history: list[dict[str, Any]], path: Path) -> None:
    """Write one JSON object per line."""
    files.write_text(path, "".join(json.dumps(row) + "\n" for row in history))


def read_history(path: Path) -> list[dict[str, Any]]:
    """Raises UserError if the file is missing or damaged."""
    try:
        return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    except (OSError, ValueError, RecursionError):
        raise _damaged(path) from None


def read_training(root: Path) -> Run:
    """The training run whose files are under root."""
    folder = root / TRAINING
    return Run(
        record=read_record(folder / RECORD),
        history=read_history(folder / HISTORY),
        summary=_read_metrics(folder / "metrics.json"),
        files=[
            (root / "data/diagnostics", "data"),
            (root / "data/diagnostics.json", "data"),
            (folder, "training"),
        ],
        model=root / "models/gpt2",
    )


def read_evaluation(root: Path) -> Run:
    """The evaluation whose files are under root; its metrics are named evaluate/..."""
    folder = root / EVALUATION
    metrics = _read_metrics(folder / "metrics.json")
    return Run(
        record=read_record(folder / RECORD),
        summary={f"evaluate/{name}": value for name, value in metrics.items()},
        files=[(folder, "evaluation")],
        parent_files=[(folder / "loss.png", "training")],
    )


@contextmanager
def lock_for_training(folder: Path) -> Iterator[None]:
    """Create an unfinished training's folder and lock it. Waits, with a message, while another
    process is training in it."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    lock = _lock(folder)
    try:
        lock.acquire(blocking=False)
    except filelock.Timeout:
        print(
            f"another process is training this variant ({folder.name}): waiting for it to end",
            file=sys.stderr,
        )
        lock.acquire(poll_interval=0.5)
    try:
        folder.mkdir(exist_ok=True)
        yield
    finally:
        lock.release()


@contextmanager
def lock_if_idle(folder: Path) -> Iterator[bool]:
    """Yield whether no process is training in the folder; if so, none can start within the
    block."""
    lock = _lock(folder)
    try:
        lock.acquire(blocking=False)
    except filelock.Timeout:
        yield False
        return
    try:
        yield True
    finally:
        lock.release()


def remove_unfinished(folder: Path) -> None:
    """Remove a training's checkpoints, then the files that identify its run. Requires
    lock_if_idle."""
    for checkpoint in folder.glob("step-*"):
        files.remove_folder(checkpoint)
    shutil.rmtree(folder)


def _lock(folder: Path) -> filelock.FileLock:
    return filelock.FileLock(folder.with_suffix(".lock"))


def _read_metrics(path: Path) -> dict[str, float]:
    try:
        return {name: float(value) for name, value in json.loads(path.read_text()).items()}
    except (OSError, ValueError, TypeError, AttributeError, RecursionError):
        raise _damaged(path) from None


def _damaged(path: Path) -> UserError:
    stage = {TRAINING.name: "train", EVALUATION.name: "evaluate"}.get(path.parent.name)
    hint = f"`dvc repro --force {stage}` recreates it" if stage else "remove it and run again"
    return UserError(f"{path} is missing or damaged: {hint}")
