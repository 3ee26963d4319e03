"""What a run is, as files: enough to write it to any MLflow store, at any later time.

The train stage keeps a record beside its history, and evaluate one beside its figures. DVC keeps
both, so a variant that comes out of its cache, or from another machine, can be shown in a store
that has never heard of it (folio/sync.py).
"""

import dataclasses
import json
import time
import uuid
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from folio import files
from folio.errors import UserError

TRAINING = Path("models/training")
EVALUATION = Path("models/evaluation")
FILE = "record.json"  # beside the history, and beside the figures of an evaluation


@dataclass(frozen=True, kw_only=True)
class Record:
    id: str  # Folio's own, the same in every store: the tag folio_id
    name: str
    started: int  # ms since 1970
    ended: int | None = None
    parent: str | None = None  # the id of the training that an evaluation belongs to
    params: dict[str, str]
    tags: dict[str, str]


@dataclass(frozen=True, kw_only=True)
class Run:
    """A record with all that goes to MLflow under it."""

    record: Record
    history: list[dict[str, Any]] = field(default_factory=list)  # rows: step, time (ms), metrics
    figures: dict[str, float] = field(default_factory=dict)  # the metrics that sum it up
    files: list[tuple[Path, str]] = field(default_factory=list)  # files and folders, and whereto
    model: Path | None = None  # a Hugging Face folder


def now() -> int:
    """Milliseconds since 1970, as MLflow counts."""
    return time.time_ns() // 1_000_000


def new_id() -> str:
    return uuid.uuid4().hex


def write(record: Record, path: Path) -> None:
    files.write_text(path, json.dumps(dataclasses.asdict(record), indent=2) + "\n")


def read(path: Path) -> Record:
    """Raises UserError if the file is missing or damaged."""
    try:
        return parse(path.read_bytes(), path)
    except OSError:
        raise UserError(f"{path} is missing or damaged: {_way_out(path)}") from None


def parse(content: bytes, path: Path) -> Record:
    """The record in a file's content. Raises UserError, naming the path, if it is damaged."""
    try:
        record = Record(**json.loads(content))
        if not isinstance(record.id, str) or not all(
            isinstance(texts, dict) for texts in (record.params, record.tags)
        ):
            raise TypeError
        return record
    except (ValueError, TypeError, RecursionError):
        raise UserError(f"{path} is missing or damaged: {_way_out(path)}") from None


def write_history(history: list[dict[str, Any]], path: Path) -> None:
    """One JSON object a line."""
    files.write_text(path, "".join(json.dumps(row) + "\n" for row in history))


def read_history(path: Path) -> list[dict[str, Any]]:
    """Raises UserError if the file is missing or damaged."""
    try:
        return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    except (OSError, ValueError, RecursionError):
        raise UserError(f"{path} is missing or damaged: {_way_out(path)}") from None


def training(root: Path) -> Run:
    """The training whose outs are under root."""
    folder = root / TRAINING
    return Run(
        record=read(folder / FILE),
        history=read_history(folder / "history.jsonl"),
        figures=_read_figures(folder / "metrics.json"),
        files=[
            (root / "data/diagnostics", "data"),
            (root / "data/diagnostics.json", "data"),
            (folder, "training"),
        ],
        model=root / "models/gpt2",
    )


def evaluation(root: Path) -> Run:
    """The evaluation whose outs are under root; its figures are named evaluate/..."""
    folder = root / EVALUATION
    figures = _read_figures(folder / "metrics.json")
    return Run(
        record=read(folder / FILE),
        figures={f"evaluate/{name}": value for name, value in figures.items()},
        files=[(folder, "evaluation")],
    )


def _read_figures(path: Path) -> dict[str, float]:
    try:
        return {name: float(value) for name, value in json.loads(path.read_text()).items()}
    except (OSError, ValueError, TypeError, AttributeError, RecursionError):
        raise UserError(f"{path} is missing or damaged: {_way_out(path)}") from None


def _way_out(path: Path) -> str:
    stage = {TRAINING.name: "train", EVALUATION.name: "evaluate"}.get(path.parent.name)
    return f"`dvc repro --force {stage}` makes it anew" if stage else "remove it and go on"
