"""Write to MLflow what it lacks: `python -m folio sync`, in the project's root.

Sends every training and evaluation that DVC keeps (here, in commits, experiments, the run cache),
then what there is of trainings that were cut short, and mends the addresses of a local store whose
project has been moved. Run twice, it changes nothing the second time.
"""

import tempfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

from folio import lock, records, tracking
from folio.cache import Cache
from folio.errors import UserError
from folio.records import Record, Run

PREPARED = "data/prepared"
KINDS = {records.TRAINING: records.training, records.EVALUATION: records.evaluation}

# Puts a run's files under a folder and returns where they are; None where some are not here.
Bring = Callable[[Path], Path | None]


def run(address: str | None, root: Path) -> list[str]:
    """Bring the store at the address up to date. Returns what was done, a line each.

    Raises UserError where the store does not take it.
    """
    told: list[str] = []
    try:
        store = tracking.Store(address, mend=True)
        statuses = store.statuses() | dict.fromkeys(store.without_model(), "WITHOUT MODEL")
        for kind, read in KINDS.items():  # trainings first: evaluations are nested under them
            for record, bring in _kept(root, kind, told):
                if statuses.get(record.id) not in ("FINISHED", "DELETED"):
                    told.append(_send(store, statuses, record, read, bring))
        told += [_send_unfinished(store, folder) for folder in _unfinished(root)]
    except tracking.Refused as problem:
        reason = tracking.reason(problem)
        raise UserError(f"MLflow did not take this: {reason}; run it again later") from None
    return [line for line in told if line]


def _send(
    store: tracking.Store,
    statuses: dict[str, str],
    record: Record,
    read: Callable[[Path], Run],
    bring: Bring,
) -> str:
    if record.parent and statuses.get(record.parent, "DELETED") == "DELETED":
        return ""  # the user has deleted it, or it is named as missing
    with tempfile.TemporaryDirectory(prefix="folio-") as folder:
        place = bring(Path(folder))
        if place is None:
            return f"not in DVC's cache: {record.name} (`dvc fetch --all-commits` may bring it)"
        try:
            store.send(read(place), "FINISHED")
        except UserError as problem:  # a damaged file holds the others up no longer than this
            return str(problem)
    statuses[record.id] = "FINISHED"
    return f"sent {record.name}"


def _kept(root: Path, kind: Path, told: list[str]) -> Iterator[tuple[Record, Bring]]:
    """The runs of a kind that are here or in DVC's cache, each with a way to get its files.

    Adds a line to told where the cache lacks some that DVC's lock files name.
    """
    path, seen, lost = kind / records.FILE, set(), set()
    cache = Cache(root)
    entries = cache.entries()
    prepared = {e.outs[PREPARED]: e.outs for e in entries if PREPARED in e.outs}
    for entry in entries:
        md5 = entry.outs.get(path.as_posix())
        if md5 is None:
            continue  # another stage
        try:
            record = records.parse(cache.read(md5) or b"", path)
        except UserError:
            lost.add(md5)
            continue
        outs = prepared.get(entry.deps.get(PREPARED, ""), {}) | entry.outs
        yield record, _from(cache, outs)
        seen.add(record.id)
    if lost:
        told.append(
            f"not in DVC's cache: {len(lost)} x {path} that lock files name"
            " (`dvc fetch --all-commits` may bring them)"
        )
    if (root / path).exists() and (made := records.read(root / path)).id not in seen:
        yield made, lambda _: root  # by hand, without DVC


def _from(cache: Cache, outs: dict[str, str]) -> Bring:
    return lambda folder: folder if cache.copy(outs, folder) else None


def _unfinished(root: Path) -> list[Path]:
    """The checkpoint folders of trainings that have not ended."""
    return sorted(path.parent for path in (root / ".checkpoints").glob("*/record.json"))


def _send_unfinished(store: tracking.Store, folder: Path) -> str:
    with lock.idle(folder) as idle:
        if not idle or not (folder / records.FILE).exists():
            return ""  # its trainer tells MLflow, or has and evaluate has removed it
        record, path = records.read(folder / records.FILE), folder / "history.jsonl"
        history = records.read_history(path) if path.exists() else []
        if not store.lacks(record, history):
            return ""
        ended = history[-1]["time"] if history else record.started
        run = Run(record=replace(record, ended=ended), history=history)
        store.send(run, "KILLED", "cut short")
        return f"sent {record.name}, cut short after step {history[-1]['step'] if history else 0}"
