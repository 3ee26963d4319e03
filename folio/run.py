"""The files of a run: record.json, history.jsonl, and the working folder of an unfinished run.

The train stage writes a record next to its history, and evaluate writes one next to its metrics.
DVC tracks both, so a run that was restored from its cache or pulled from another machine can still
be written to any MLflow store later (folio/tracking/sync.py).
"""

import contextlib
import dataclasses
import json
import math
import os
import shutil
import sys
import time
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import filelock

from folio import files
from folio.errors import UserError

TRAINING = Path("models/training")
EVALUATION = Path("models/evaluation")
MODEL = Path("models/gpt2")
RECORD = "record.json"  # in both folders
HISTORY = "history.jsonl"  # in TRAINING
UNFINISHED = ".checkpoints"  # contains a folder for each unfinished training run, by train_key

# The artifacts of a training run and of an evaluation: file -> folder in MLflow. Other files in the
# same folders belong to neither: the user or an earlier version of Folio put them there.
ARTIFACTS = {
    TRAINING: {
        "data/diagnostics.json": "data",
        "data/diagnostics/lengths.png": "data",
        "data/diagnostics/most_common_tokens.csv": "data",
        "data/diagnostics/rank_frequency.png": "data",
        "models/training/history.csv": "training",
        "models/training/history.jsonl": "training",
        "models/training/metrics.json": "training",
        "models/training/run.json": "training",
        "models/training/val_loss.csv": "training",
    },
    EVALUATION: {
        "models/evaluation/loss.png": "evaluation",
        "models/evaluation/loss_by_position.png": "evaluation",
        "models/evaluation/loss_by_rarity.png": "evaluation",
        "models/evaluation/metrics.json": "evaluation",
        "models/evaluation/samples.md": "evaluation",
    },
}


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
    history_md5: str | None = None  # of the history file of a finished training run
    summary: dict[str, float] = field(default_factory=dict)  # metrics of the whole run
    files: list[tuple[Path, str]] = field(default_factory=list)  # (file or folder, artifact folder)
    parent_files: list[tuple[Path, str]] = field(default_factory=list)  # the same, for the parent
    model: Path | None = None  # a Hugging Face folder


def project_root() -> Path:
    """The folder that contains the MLflow store and unfinished training runs: DVC's root, even if
    DVC runs an experiment in a copy of the project."""
    return Path(os.environ.get("DVC_ROOT") or Path.cwd()).resolve()


def run_name(name: str) -> str:
    """The name, prefixed with the name of the DVC experiment if the run belongs to one."""
    return " ".join(filter(None, [os.environ.get("DVC_EXP_NAME"), name]))


def now_ms() -> int:
    """Milliseconds since 1970, the unit of MLflow's timestamps."""
    return time.time_ns() // 1_000_000


def new_id() -> str:
    return uuid.uuid4().hex


def kept(metrics: Mapping[str, float]) -> tuple[float, float]:
    """The validation loss in nats/token of the weights that a run has kept, and their step, from
    its summary metrics; infinity and 0 if there are none.

    Runs from before train.keep have the best evaluation only, whose weights they have kept.
    """
    name = "kept" if "kept_val_loss" in metrics else "best"
    return metrics.get(f"{name}_val_loss", math.inf), metrics.get(f"{name}_step", 0)


def write_record(record: Record, path: Path) -> None:
    files.write_text(path, json.dumps(dataclasses.asdict(record), indent=2) + "\n")


def read_record(path: Path) -> Record:
    """Read a record. Raises UserError if the file is missing or damaged."""
    try:
        return parse_record(path.read_bytes(), path)
    except OSError:
        raise _damaged(path) from None


def parse_record(content: bytes, path: Path) -> Record:
    """Parse a file's content as a record. If it is damaged, raises UserError with the path."""
    try:
        record = Record(**json.loads(content))
        texts = [record.id, record.name, record.parent or ""]
        texts += [*record.params.values(), *record.tags.values()]
        if not all(isinstance(text, str) for text in texts):
            raise TypeError
        if not all(type(time) is int for time in (record.started, record.ended or 0)):
            raise TypeError
        return record
    except (ValueError, TypeError, AttributeError, RecursionError):
        raise _damaged(path) from None


def write_history(history: list[dict[str, Any]], path: Path) -> None:
    """Write one JSON object per line."""
    files.write_text(path, "".join(json.dumps(row) + "\n" for row in history))


def read_history(path: Path) -> list[dict[str, Any]]:
    """Read the rows of a history. Raises UserError if the file is missing or damaged."""
    try:
        rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        if not all(_is_row(row) for row in rows):
            raise ValueError
        return rows
    except (OSError, ValueError, RecursionError):
        raise _damaged(path) from None


def read_training(root: Path) -> Run:
    """The training run whose files are under root."""
    folder = root / TRAINING
    return Run(
        record=read_record(folder / RECORD),
        history=read_history(folder / HISTORY),
        history_md5=files.md5(folder / HISTORY),
        summary=_read_metrics(folder / "metrics.json"),
        files=[(root / path, place) for path, place in ARTIFACTS[TRAINING].items()],
        model=root / MODEL,
    )


def read_evaluation(root: Path) -> Run:
    """The evaluation whose files are under root; its metrics are named evaluate/..."""
    folder = root / EVALUATION
    metrics = _read_metrics(folder / "metrics.json")
    return Run(
        record=read_record(folder / RECORD),
        summary={f"evaluate/{name}": value for name, value in metrics.items()},
        files=[(root / path, place) for path, place in ARTIFACTS[EVALUATION].items()],
        parent_files=[(folder / "loss.png", "training")],
    )


def parse_metrics(content: bytes, path: Path) -> dict[str, float]:
    """Parse the content of a metrics.json. If it is damaged, raises UserError with the path."""
    try:
        return {name: float(value) for name, value in json.loads(content).items()}
    except (ValueError, TypeError, AttributeError, OverflowError, RecursionError):
        raise _damaged(path) from None


@contextmanager
def lock_for_training(folder: Path) -> Iterator[None]:
    """Create and lock the folder of an unfinished training run. While another process is training
    in it, prints a message and waits."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    lock = _lock(folder)
    try:
        lock.acquire(blocking=False)
    except filelock.Timeout:
        print(
            f"another process is training this variant ({folder.name}): waiting for it to finish",
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
    """Yield True if no process is training in the folder, and keep any from starting within the
    block; otherwise yield False."""
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


def is_training(root: Path) -> bool:
    """Whether a process is training in the project at `root`."""
    for lock in (root / UNFINISHED).glob("*.lock"):
        with lock_if_idle(lock.with_suffix("")) as idle:
            if not idle:
                return True
    return False


def unfinished_steps(root: Path) -> dict[str, int]:
    """The last step that each unfinished training run has saved, by the name of its DVC experiment.

    Leaves out runs of no experiment, and those whose files are missing or damaged.
    """
    steps = {}
    for path in (root / UNFINISHED).glob(f"*/{RECORD}"):
        with contextlib.suppress(UserError):
            experiment = read_record(path).tags.get("dvc_experiment", "")
            history = read_history(path.parent / HISTORY)
            steps[experiment] = history[-1]["step"] if history else 0
    steps.pop("", None)
    return steps


def remove_unfinished(folder: Path) -> None:
    """Remove the checkpoints of a training run, then the files that identify it. The caller must
    hold lock_if_idle."""
    for checkpoint in folder.glob("step-*"):
        files.remove_folder(checkpoint)
    shutil.rmtree(folder)


def _lock(folder: Path) -> filelock.FileLock:
    return filelock.FileLock(folder.with_suffix(".lock"))


def _is_row(row: Any) -> bool:
    """Whether a row of a history has a step, a time and nothing but numbers."""
    if not isinstance(row, dict) or any(type(row.get(key)) is not int for key in ("step", "time")):
        return False
    return all(type(value) in (int, float) for value in row.values())


def _read_metrics(path: Path) -> dict[str, float]:
    try:
        return parse_metrics(path.read_bytes(), path)
    except OSError:
        raise _damaged(path) from None


def _damaged(path: Path) -> UserError:
    stage = {TRAINING.name: "train", EVALUATION.name: "evaluate"}.get(path.parent.name)
    hint = f"`rm -f {path}`, then run the same command again"
    if stage:
        hint = f"`dvc repro` restores it, otherwise `dvc repro --force {stage}` recreates it"
    return UserError(f"{path} is missing or damaged: {hint}")
