"""Finds and frees what no workspace, commit, experiment, registered model or visible run uses."""

import contextlib
import re
import sqlite3
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from mlflow.entities import LoggedModel
from mlflow.entities import Run as MlflowRun

from folio.run import HISTORY, RECORD, UNFINISHED, lock_if_idle, remove_unfinished
from folio.tracking import local_store, queries, sizes
from folio.tracking.inventory import Inventory, model_folder, run_folder
from folio.tracking.store import Store

_DAY = 86_400  # seconds
_RUN, _MODEL = re.compile(r"[0-9a-f]{32}"), re.compile(r"m-[0-9a-f]{32}")
_SQLITE = b"SQLite format 3\0"


@dataclass
class Garbage:
    """What can be freed. The order of the fields is the order in which `free` removes things."""

    run_cache: list[Path] = field(default_factory=list)  # entries of runs that cannot be restored
    objects: list[Path] = field(default_factory=list)  # in DVC's cache
    trash: list[MlflowRun] = field(default_factory=list)  # runs in MLflow's trash
    models: list[LoggedModel] = field(default_factory=list)  # models in MLflow's trash
    artifacts: list[Path] = field(default_factory=list)  # of the runs and models in the trash
    orphans: list[Path] = field(default_factory=list)  # artifacts that no MLflow store refers to
    checkpoints: list[Path] = field(default_factory=list)
    temporary: list[Path] = field(default_factory=list)  # copies of the project in .dvc/tmp/exps
    notes: list[str] = field(default_factory=list)  # what is left out, and why

    def sizes(self) -> dict[str, int]:
        """The bytes on disk, by the place where they are."""
        places = {
            "DVC's cache": self.run_cache + self.objects,
            "MLflow's artifacts": self.artifacts + self.orphans,
            "checkpoints": self.checkpoints,
            "DVC's temporary folders": self.temporary,
        }
        return {place: sum(map(sizes.of, paths)) for place, paths in places.items()}

    def describe(self) -> list[str]:
        """A line for each kind of garbage that there is."""
        kinds = {
            "objects in DVC's cache that nothing uses": self.objects,
            "entries of DVC's run cache": self.run_cache,
            "runs and models in MLflow's trash": self.artifacts,
            "folders of artifacts that MLflow does not refer to": self.orphans,
            "checkpoints": self.checkpoints,
            "temporary copies of the project in .dvc/tmp": self.temporary,
        }
        return [
            f"{text}: {len(paths)}, {sizes.shown(sum(map(sizes.of, paths)))}"
            for text, paths in kinds.items()
            if paths
        ]


def find(inventory: Inventory, days: float | None = None, own_cache: bool = False) -> Garbage:
    """What can be freed.

    days: also the checkpoints of training runs that were interrupted earlier than this many days
    ago. own_cache: no other project uses DVC's cache, even if it is outside this project.
    """
    garbage = Garbage()
    _add_objects(garbage, inventory, own_cache)
    store = inventory.store
    if store and store.path:
        _add_trash(garbage, inventory, store)
        _add_orphans(garbage, store)
    elif store:
        garbage.notes.append(
            "MLflow's artifacts are on a server: docs/housekeeping.md shows how its admin frees"
            " their space"
        )
    _add_checkpoints(garbage, inventory, days)
    temporary = inventory.root / ".dvc/tmp/exps"
    garbage.temporary = [*temporary.glob("tmp*"), *temporary.glob("standalone/tmp*")]
    return garbage


def free(garbage: Garbage, inventory: Inventory) -> int:
    """Remove the garbage, and return the bytes on disk that this freed.

    No stage may be running, and no dvc command (folio/cli/idle.py). It can be killed at any time:
    references are removed before what they refer to, so a second call removes the rest.
    """
    store, freed = inventory.store, 0
    if store:
        known = inventory.notes
        for folio_id in {run.data.tags.get("folio_id", "") for run in garbage.trash} - {""}:
            if folio_id not in known:
                queries.mark_removed(store, folio_id)
    for path in _in_order(garbage):
        freed += sizes.remove(path)
        with contextlib.suppress(OSError):  # it is not empty
            path.parent.rmdir()
    for folder in garbage.checkpoints:
        with lock_if_idle(folder) as is_idle:
            if is_idle and folder.is_dir():
                freed += sizes.of(folder)
                remove_unfinished(folder)
    if store and store.path:
        _delete_permanently(store, garbage)
    return freed


def _in_order(garbage: Garbage) -> list[Path]:
    """The files and folders to remove. Listings of folders come before the files in them, as for
    `dvc gc`: DVC takes a folder to be complete if its listing exists."""
    objects = sorted(garbage.objects, key=lambda path: not path.name.endswith(".dir"))
    return [
        *garbage.run_cache,
        *objects,
        *garbage.artifacts,
        *garbage.orphans,
        *garbage.temporary,
    ]


def _add_objects(garbage: Garbage, inventory: Inventory, own_cache: bool) -> None:
    usage = inventory.usage
    if not own_cache and not usage.folder.resolve().is_relative_to(inventory.root.resolve()):
        garbage.notes.append(
            f"DVC's cache is outside the project, so others may use it: {usage.folder} (--own-cache"
            " includes it)"
        )
        return
    used = inventory.used_objects()
    garbage.objects = [path for md5, path in usage.files.items() if md5 not in used]
    for stage in usage.run_cache:
        outs = set(stage.entry.outs.values())
        is_usable = outs <= used & usage.files.keys() and bool(outs)
        # A run that MLflow does not have yet may be waiting for `dvc fetch` and sync.
        is_waiting = stage.objects <= used and (stage.record or not stage.is_readable)
        if not is_usable and not is_waiting:
            garbage.run_cache.append(stage.file)


def _add_trash(garbage: Garbage, inventory: Inventory, store: Store) -> None:
    """Add the deleted runs and models, except those that a registered model refers to."""
    versions = [version for run in inventory.runs for version in run.versions]
    runs_in_use = {version.run_id for version in versions}
    models_in_use = {(version.source or "").removeprefix("models:/") for version in versions}
    garbage.trash = [
        run
        for run in inventory.tracked
        if queries.status_of(run) == "DELETED"
        and run.info.run_id not in runs_in_use
        and run_folder(store, run)  # otherwise its artifacts would remain elsewhere
    ]
    gone = {run.info.run_id for run in garbage.trash}
    garbage.models = [
        model
        for model in [
            *inventory.models,
            *local_store.deleted_models(store.client, store.experiment_id),
        ]
        if (model.source_run_id in gone or model not in inventory.models)
        and model.model_id not in models_in_use
        and model_folder(store, model)
    ]
    places = [run_folder(store, run) for run in garbage.trash]
    places += [model_folder(store, model) for model in garbage.models]
    garbage.artifacts = [place for place in places if place and place.is_dir()]


def _add_orphans(garbage: Garbage, store: Store) -> None:
    assert store.path
    mlruns = store.path.parent / "mlruns"
    if not mlruns.is_dir() or mlruns.is_symlink():  # other projects may use the linked folder
        return
    places = [*mlruns.glob("*"), *mlruns.glob("models/*")]  # listed before the runs are read
    known: set[str] = set()
    for database in _databases(store.path.parent):
        try:
            known |= local_store.ids(database)
        except sqlite3.Error:
            garbage.notes.append(
                f"artifacts without a run may belong to {database.name}, which cannot be read:"
                " remove that file if you do not need it"
            )
            return
    garbage.orphans = [
        place
        for place in places
        if (_RUN.fullmatch(place.name) or _MODEL.fullmatch(place.name)) and place.name not in known
    ]


def _add_checkpoints(garbage: Garbage, inventory: Inventory, days: float | None) -> None:
    """Add the checkpoints of removed runs, those without a record, and old ones."""
    runs = {run.checkpoint: run for run in inventory.runs if run.checkpoint}
    for folder in sorted((inventory.root / UNFINISHED).glob("*/")):
        found = runs.get(folder)
        is_removed = found is not None and inventory.is_removed(found.id)
        is_old = days is not None and time.time() - _last_change(folder) > days * _DAY
        # A kill during `remove` leaves a folder without a record; a damaged record is kept.
        if is_removed or is_old or not (folder / RECORD).exists():
            with lock_if_idle(folder) as is_idle:
                if is_idle:
                    garbage.checkpoints.append(folder)


def _last_change(folder: Path) -> float:
    files = [path for path in (folder / HISTORY, folder / RECORD) if path.exists()]
    return max((path.stat().st_mtime for path in files), default=folder.stat().st_mtime)


def _databases(folder: Path) -> Iterable[Path]:
    """The SQLite files in a folder: the MLflow store, and copies of it."""
    for path in folder.iterdir():
        if path.is_file() and path.stat().st_size:
            with path.open("rb") as file:
                if file.read(len(_SQLITE)) == _SQLITE:
                    yield path


def _delete_permanently(store: Store, garbage: Garbage) -> None:
    """Delete the models and runs in the trash, as `mlflow gc` does, which would also delete the
    runs of other experiments."""
    for model in garbage.models:
        local_store.delete_model(store.client, model.model_id)
    for run in garbage.trash:
        local_store.delete_run(store.client, run.info.run_id)
