"""Finds finished runs with missing or damaged files in MLflow, which their status does not show."""

from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from mlflow.entities import LoggedModel
from mlflow.entities import Run as MlflowRun

from folio.run import TRAINING
from folio.tracking import logged_models
from folio.tracking.artifacts import Artifacts
from folio.tracking.queries import HISTORY_MD5, status_of
from folio.tracking.run_sources import RunSource, RunSources
from folio.tracking.store import Store

T = TypeVar("T")

_THREADS = 8  # a server handles several requests at once


class Listings:
    """The artifacts of runs. Each folder is listed once, until `forget`."""

    def __init__(self, store: Store):
        self._store = store
        self._known: dict[str, Artifacts] = {}

    def of(self, run: MlflowRun) -> Artifacts:
        new = Artifacts(run.info.artifact_uri, self._store.uri)
        return self._known.setdefault(run.info.run_id, new)

    def forget(self, run: MlflowRun) -> None:
        self._known.pop(run.info.run_id, None)


def incomplete_runs(
    runs: dict[str, MlflowRun],
    found: Iterable[RunSource],
    sources: RunSources,
    listings: Listings,
    complete_models: set[str],
) -> set[str]:
    """The folio_ids of finished runs with missing or damaged files in MLflow.

    runs: all runs in the store, by folio_id. found: the runs to check. complete_models: the ids of
    the runs whose model is complete. In a local store, the artifacts' checksums are compared too.
    """

    def is_incomplete(source: RunSource) -> bool:
        run = runs[source.record.id]
        if source.kind == TRAINING and run.info.run_id not in complete_models:
            return True
        artifacts = listings.of(run)
        return not any(
            all(artifacts.has(path, *expected) for path, expected in version.items())
            for version in sources.artifacts(source)
        )

    to_check = [
        source
        for source in found
        if _is_ours(sources.history_md5(source), runs.get(source.record.id))
    ]
    results = _in_parallel(is_incomplete, to_check)
    return {source.record.id for source, incomplete in results if incomplete}


def check_models(store: Store) -> tuple[set[str], set[str]]:
    """The ids of the runs whose model is complete in the store, and of those whose model was once
    complete but has lost files."""
    models = logged_models.all_models(store)
    checked = _in_parallel(lambda model: logged_models.is_complete(store, model), models)
    complete = {model.source_run_id or "" for model, ok in checked if ok}
    damaged = {model.source_run_id or "" for model, ok in checked if not ok and _is_ready(model)}
    return complete, damaged - complete


def _is_ready(model: LoggedModel) -> bool:
    return model.status == "READY"


def _is_ours(history_md5: str | None, run: MlflowRun | None) -> bool:
    """Whether a run has finished in MLflow, and not in another copy of this project."""
    if run is None or status_of(run) != "FINISHED":
        return False
    return not history_md5 or run.data.tags.get(HISTORY_MD5, history_md5) == history_md5


def _in_parallel(function: Callable[[T], bool], items: list[T]) -> list[tuple[T, bool]]:
    with ThreadPoolExecutor(_THREADS) as pool:
        return list(zip(items, pool.map(function, items), strict=True))
