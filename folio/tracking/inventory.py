"""What each training run has on disk, in MLflow and in DVC, and what keeps it."""

import time
from collections import defaultdict
from collections.abc import Callable, Set
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from mlflow.entities import LoggedModel, ViewType
from mlflow.entities import Run as MlflowRun
from mlflow.entities.model_registry import ModelVersion

from folio.errors import UserError
from folio.run import RECORD, TRAINING, UNFINISHED, lock_if_idle, read_record
from folio.tracking import cache_usage, local_store, queries, sizes
from folio.tracking.artifacts import Artifacts
from folio.tracking.cache_usage import CacheUsage, Experiment, Objects
from folio.tracking.logged_models import all_models
from folio.tracking.store import Store, all_pages

PARENT, EXPERIMENT = "mlflow.parentRunId", "dvc_experiment"  # tags


@dataclass(kw_only=True)
class Holdings:
    """A training run, and everything that belongs to it. Sizes are bytes on disk."""

    id: str  # its folio_id
    name: str
    experiment: str = ""  # the DVC experiment that trained it
    run: MlflowRun | None = None  # None if MLflow does not have it
    nested: list[MlflowRun] = field(default_factory=list)  # its evaluations
    models: list[LoggedModel] = field(default_factory=list)
    versions: list[ModelVersion] = field(default_factory=list)
    experiments: list[Experiment] = field(default_factory=list)
    checkpoint: Path | None = None
    is_training: bool = False
    is_in_workspace: bool = False
    commit: str | None = None  # the MD5 of its record, if a commit of a branch or tag lists it
    objects: set[str] = field(default_factory=set)  # in DVC's cache; those no other run uses
    in_mlflow: int = 0

    @property
    def is_removed(self) -> bool:
        """Whether MLflow has the run in its trash. A registered model is still in use."""
        deleted = self.run is not None and queries.status_of(self.run) == "DELETED"
        return deleted and not self.versions

    @property
    def aliases(self) -> list[str]:
        return [f"{v.name}@{alias}" for v in self.versions for alias in v.aliases]

    @property
    def in_checkpoint(self) -> int:
        return sizes.of(self.checkpoint) if self.checkpoint else 0


class Inventory:
    """The project's runs, and the objects in DVC's cache.

    store: None if there is no MLflow store yet. `runs` has the newest run first.
    """

    def __init__(self, root: Path, store: Store | None):
        """Raises UserError if git or DVC fails, and STORE_ERRORS if MLflow does."""
        self.root, self.store = root, store
        self.usage: CacheUsage = cache_usage.read(root)
        self._runs: dict[str, Holdings] = {}
        self.notes = queries.removed(store) if store else {}  # on removed runs, by folio_id
        self.tracked = _tracked(store) if store else []
        self.models = all_models(store) if store else []
        self._add_runs()
        self._add_cached_runs()
        self._add_checkpoints()
        self._measure_cache()
        self._measure_mlflow()
        self.runs = sorted(self._runs.values(), key=_started, reverse=True)

    def is_removed(self, folio_id: str) -> bool:
        """Whether a run was removed, or deleted in MLflow."""
        found = self._runs.get(folio_id)
        if found is None or found.run is None:
            return folio_id in self.notes
        return found.is_removed

    def size_of(self, objects: Objects | set[str]) -> int:
        """The bytes on disk of those of the objects that are in DVC's cache."""
        files = self.usage.files
        return sum(sizes.of(files[md5]) for md5 in objects if md5 in files)

    def used_objects(self) -> set[str]:
        """The objects that are in use by the workspace, by any commit or experiment, or by a run in
        the run cache that was not removed."""
        usage = self.usage
        used = set(usage.workspace | usage.commits | usage.unlisted)
        for experiment in usage.experiments:
            used |= experiment.objects
        deleted = {r.data.tags.get("folio_id") for r in self.tracked if _is_deleted(r)}
        for stage in usage.run_cache:
            if record := stage.record:
                own = self.is_removed(record.parent or record.id)
                is_used = not own and not (record.parent and record.id in deleted)
            else:
                is_used = not stage.is_readable  # a damaged record may belong to any run
            used |= stage.objects if is_used else set()
        return used

    def _of(self, folio_id: str, name: str) -> Holdings:
        return self._runs.setdefault(folio_id, Holdings(id=folio_id, name=name))

    def _add_runs(self) -> None:
        """Add what MLflow has."""
        by_run: dict[str, Holdings] = {}
        for run in self.tracked:
            folio_id = run.data.tags.get("folio_id", "")
            if folio_id and PARENT not in run.data.tags:
                by_run[run.info.run_id] = found = self._of(folio_id, run.info.run_name)
                found.run, found.experiment = run, run.data.tags.get(EXPERIMENT, "")
        for run in self.tracked:
            if parent := by_run.get(run.data.tags.get(PARENT, "")):
                parent.nested.append(run)
        for model in self.models:
            if source := by_run.get(model.source_run_id or ""):
                source.models.append(model)
        for version in all_pages(self.store.client.search_model_versions) if self.store else ():
            if source := by_run.get(version.run_id or ""):
                source.versions.append(_with_aliases(self.store, version))

    def _add_cached_runs(self) -> None:
        """Add what DVC has, and what is in the workspace."""
        usage = self.usage
        for md5, record in usage.training.items():
            found = self._of(record.id, record.name)
            found.experiment = record.tags.get(EXPERIMENT, "")
            found.is_in_workspace |= md5 in usage.workspace
            if md5 in usage.commits:
                found.commit = md5
        for experiment in usage.experiments:
            for folio_id in usage.runs_in(experiment.objects) & self._runs.keys():
                self._runs[folio_id].experiments.append(experiment)
        path = self.root / TRAINING / RECORD
        if path.is_file():
            try:
                current = read_record(path)
            except UserError:  # damaged; doctor reports it
                return
            self._of(current.id, current.name).is_in_workspace = True

    def _add_checkpoints(self) -> None:
        for path in (self.root / UNFINISHED).glob(f"*/{RECORD}"):
            try:
                record = read_record(path)
            except UserError:  # damaged; doctor reports it
                continue
            found = self._of(record.id, record.name)
            found.experiment = record.tags.get(EXPERIMENT, "")
            found.checkpoint = path.parent
            with lock_if_idle(path.parent) as is_idle:
                found.is_training = not is_idle

    def _measure_cache(self) -> None:
        """Find the objects that only one run uses, apart from commits and the workspace."""
        usage, owners = self.usage, defaultdict[str, set[str]](set)
        roots: list[tuple[set[str], Set[str]]] = [({id}, made) for id, made in usage.outs.items()]
        roots += [(usage.runs_in(each.objects), each.objects) for each in usage.experiments]
        for stage in usage.run_cache:
            if stage.record:
                roots.append(({stage.record.parent or stage.record.id}, stage.objects))
        for runs, objects in roots:
            for md5 in objects & usage.files.keys():
                owners[md5] |= runs
        for md5, runs in owners.items():
            folio_id = next(iter(runs), "")
            if len(runs) == 1 and folio_id in self._runs:
                self._runs[folio_id].objects.add(md5)

    def _measure_mlflow(self) -> None:
        store = self.store
        trash = []
        if store and store.path:
            trash = local_store.deleted_models(store.client, store.experiment_id)
        for found in self._runs.values():
            runs = [run for run in [found.run, *found.nested] if run]
            ids = {run.info.run_id for run in runs}
            models = found.models + [model for model in trash if model.source_run_id in ids]
            places = [run_folder(store, run) for run in runs]
            places += [model_folder(store, model) for model in models]
            found.in_mlflow = sum(sizes.of(place) for place in places if place)


def run_folder(store: Store | None, run: MlflowRun) -> Path | None:
    """The folder of a run's artifacts; None if they are not on this machine."""
    return _local(store, run.info.artifact_uri)


def model_folder(store: Store | None, model: LoggedModel) -> Path | None:
    """The folder of a logged model; None if it is not on this machine."""
    return _local(store, model.artifact_location)


def _local(store: Store | None, uri: str) -> Path | None:
    folder = Artifacts(uri, store.uri).folder if store and store.path else None
    # MLflow stores artifacts in ID/artifacts.
    return folder.parent if folder and folder.name == "artifacts" else folder


def _tracked(store: Store) -> list[MlflowRun]:
    """All runs in the store, including deleted ones."""
    search: Callable = partial(store.client.search_runs, [store.experiment_id])
    return list(all_pages(partial(search, run_view_type=ViewType.ALL)))


def _with_aliases(store: Store | None, version: ModelVersion) -> ModelVersion:
    assert store  # a search leaves out the aliases
    return store.client.get_model_version(version.name, str(version.version))


def _is_deleted(run: MlflowRun) -> bool:
    return queries.status_of(run) == "DELETED"


def _started(found: Holdings) -> int:
    return found.run.info.start_time if found.run else time.time_ns() // 1_000_000
