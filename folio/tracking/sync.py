"""Sending the runs that are missing in MLflow: `python -m folio sync`, in the project's root.

Sends every training and evaluation in the workspace and in DVC's cache (of all commits, experiments
and the run cache), then the last state of interrupted trainings. Updates the artifact URIs in a
local store whose project was moved. Idempotent: a second sync changes nothing.
"""

import tempfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

from folio.errors import UserError
from folio.run import (
    EVALUATION,
    HISTORY,
    RECORD,
    TRAINING,
    UNFINISHED,
    Record,
    Run,
    lock_if_idle,
    parse_record,
    read_evaluation,
    read_history,
    read_record,
    read_training,
)
from folio.tracking import queries, registry
from folio.tracking.dvc_cache import DvcCache
from folio.tracking.store import STORE_ERRORS, Store, first_line
from folio.tracking.writer import RunWriter

PREPARED = "data/prepared"
_FETCH = "`dvc fetch --all-commits`"
KINDS = {TRAINING: read_training, EVALUATION: read_evaluation}

# Copies a run's files into a folder and returns their root, or None if the cache misses some.
Restore = Callable[[Path], Path | None]


def run(uri: str | None, root: Path) -> list[str]:
    """Bring the MLflow store up to date with the project at `root`.

    Returns a message for each run that was sent or that is incomplete in the cache. Raises
    UserError if MLflow fails.
    """
    messages: list[str] = []
    try:
        store = Store(uri, repair=True)
        writer = RunWriter(store)
        without_model = dict.fromkeys(registry.runs_without_model(store), "WITHOUT MODEL")
        statuses = queries.statuses(store) | without_model
        for kind, read in KINDS.items():  # trainings first, as the parents of evaluations
            for record, restore in _runs(root, kind, messages):
                if statuses.get(record.id) not in ("FINISHED", "DELETED"):
                    messages.append(_send(writer, statuses, record, read, restore))
        messages += [_send_unfinished(store, writer, folder) for folder in _unfinished(root)]
    except STORE_ERRORS as problem:
        raise UserError(f"MLflow failed: {first_line(problem)}; sync again later") from None
    return [line for line in messages if line]


def _send(
    writer: RunWriter,
    statuses: dict[str, str],
    record: Record,
    read: Callable[[Path], Run],
    restore: Restore,
) -> str:
    """Send a run, mark it as finished in `statuses`, and return a message; "" if it is skipped."""
    if record.parent and statuses.get(record.parent, "DELETED") == "DELETED":
        return ""  # the user deleted the training, or another message reports it
    with tempfile.TemporaryDirectory(prefix="folio-") as folder:
        root = restore(Path(folder))
        if root is None:
            return f"not in DVC's cache: some files of {record.name} ({_FETCH} may restore them)"
        try:
            writer.send(read(root), "FINISHED")
        except UserError as problem:  # a damaged file; the other runs are sent nevertheless
            return str(problem)
    statuses[record.id] = "FINISHED"
    return f"sent {record.name}"


def _runs(root: Path, kind: Path, messages: list[str]) -> Iterator[tuple[Record, Restore]]:
    """The runs of a kind in DVC's cache and in the workspace, and the functions to restore them.

    kind: TRAINING or EVALUATION. Adds a message if the cache misses records that lock files list.
    """
    path, seen, missing = kind / RECORD, set(), set()
    cache = DvcCache(root)
    entries = cache.entries()
    prepared = {e.outs[PREPARED]: e.outs for e in entries if PREPARED in e.outs}
    for entry in entries:
        md5 = entry.outs.get(path.as_posix())
        if md5 is None:
            continue  # another stage
        try:
            record = parse_record(cache.read(md5) or b"", path)
        except UserError:
            missing.add(md5)
            continue
        outs = prepared.get(entry.deps.get(PREPARED, ""), {}) | entry.outs
        yield record, _from(cache, outs)
        seen.add(record.id)
    if missing:
        messages.append(
            f"not in DVC's cache: {len(missing)} x {path}, listed in lock files"
            f" ({_FETCH} may restore them)"
        )
    if (root / path).exists() and (record := read_record(root / path)).id not in seen:
        yield record, lambda _: root  # the stage ran without DVC


def _from(cache: DvcCache, outs: dict[str, str]) -> Restore:
    return lambda folder: folder if cache.copy(outs, folder) else None


def _unfinished(root: Path) -> list[Path]:
    """The folders of unfinished trainings."""
    return sorted(path.parent for path in (root / UNFINISHED).glob(f"*/{RECORD}"))


def _send_unfinished(store: Store, writer: RunWriter, folder: Path) -> str:
    """Send an interrupted training, and return a message; "" if there is nothing to send."""
    with lock_if_idle(folder) as idle:
        if not idle or not (folder / RECORD).exists():
            return ""  # its trainer sends it, or evaluate has just removed the folder
        record, path = read_record(folder / RECORD), folder / HISTORY
        history = read_history(path) if path.exists() else []
        if not queries.is_outdated(store, record, history):
            return ""
        ended = history[-1]["time"] if history else record.started
        run = Run(record=replace(record, ended=ended), history=history)
        writer.send(run, "KILLED", "interrupted")
        return f"sent {record.name}, interrupted after step {history[-1]['step'] if history else 0}"
