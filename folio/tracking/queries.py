"""Reading runs out of an MLflow store."""

import math
from dataclasses import dataclass
from typing import Any

from mlflow.entities import Run as MlflowRun
from mlflow.entities import ViewType

from folio.errors import UserError
from folio.run import Record
from folio.tracking.store import SYNC, Store


@dataclass(frozen=True, kw_only=True)
class TrackedRun:
    """A training run as MLflow has it."""

    id: str  # MLflow's run id
    folio_id: str
    name: str
    experiment: str  # of DVC
    status: str
    started: int  # ms since 1970
    ended: int | None
    params: dict[str, str]
    metrics: dict[str, float]  # the last value of each
    tags: dict[str, str]

    @property
    def loss(self) -> float:
        """The best validation loss in nats/token; infinite where there is none."""
        return self.metrics.get("best_val_loss", math.inf)


def tracked_run(run: MlflowRun) -> TrackedRun:
    tags = run.data.tags
    return TrackedRun(
        id=run.info.run_id,
        folio_id=tags.get("folio_id", ""),
        name=run.info.run_name,
        experiment=tags.get("dvc_experiment", ""),
        status=run.info.status,
        started=run.info.start_time,
        ended=run.info.end_time,
        params=run.data.params,
        metrics=run.data.metrics,
        tags=tags,
    )


def status_of(run: MlflowRun) -> str:
    """MLflow's status, or DELETED for a run that the user deleted."""
    return "DELETED" if run.info.lifecycle_stage == "deleted" else run.info.status


def find(store: Store, folio_id: str) -> MlflowRun | None:
    """The run with that folio_id, deleted or not."""
    found = store.client.search_runs(
        [store.experiment_id], f"tags.folio_id = '{folio_id}'", ViewType.ALL, max_results=1
    )
    return found[0] if found else None


def run_id(store: Store, folio_id: str) -> str:
    """MLflow's id of the run with that folio_id. Raises UserError where there is none."""
    found = find(store, folio_id)
    if found is None:
        raise UserError(f"the run {folio_id} is not in MLflow: {SYNC} sends it")
    return found.info.run_id


def statuses(store: Store) -> dict[str, str]:
    """The status of every run that Folio created, by folio_id, deleted ones included."""
    found: dict[str, str] = {}
    token = None
    while token is None or token:
        page = store.client.search_runs(
            [store.experiment_id], run_view_type=ViewType.ALL, page_token=token
        )
        found |= {run.data.tags.get("folio_id", ""): status_of(run) for run in page}
        token = page.token or ""
    return found


def list_runs(store: Store) -> list[TrackedRun]:
    """The training runs in the store, newest first."""
    found: list[TrackedRun] = []
    token = None
    while token is None or token:
        page = store.client.search_runs(
            [store.experiment_id], order_by=["attributes.start_time DESC"], page_token=token
        )
        found += [tracked_run(run) for run in page if "mlflow.parentRunId" not in run.data.tags]
        token = page.token or ""
    return found


def find_run(store: Store, name: str) -> TrackedRun:
    """The training run with that MLflow id, folio_id, DVC experiment or name, or with an id that
    begins so. Raises UserError unless there is exactly one."""
    if not name:
        raise UserError("which run? `python -m folio compare` lists them")
    runs = list_runs(store)
    exact = [run for run in runs if name in (run.id, run.folio_id, run.name, run.experiment)]
    found = exact or [run for run in runs if run.id.startswith(name) and len(name) > 3]
    if len(found) == 1:
        return found[0]
    ids = ", ".join(run.id for run in found)
    raise UserError(
        f"{len(found)} runs are named {name!r}; give the id of one: {ids}"
        if found
        else f"MLflow has no run {name!r}: `python -m folio compare` lists them"
    )


def is_outdated(store: Store, record: Record, history: list[dict[str, Any]]) -> bool:
    """Whether MLflow has an interrupted training as still running, or not as far as it got."""
    found = find(store, record.id)
    if found is None or status_of(found) == "RUNNING":
        return True
    stopped, last = status_of(found) in ("KILLED", "FAILED"), history[-1] if history else {}
    key = "train_loss" if last.get("step") else "val_loss"  # the row of step 0 has only this one
    return stopped and found.data.metrics.get(key) != last.get(key)


def loss_history(store: Store, run_id: str) -> list[dict[str, Any]]:
    """Training and validation loss by step, in rows like those of a history."""
    rows: dict[int, dict[str, Any]] = {}
    for key in ("train_loss", "val_loss"):
        for point in store.client.get_metric_history(run_id, key):
            rows.setdefault(point.step, {"step": point.step})[key] = point.value
    return [rows[step] for step in sorted(rows)]
