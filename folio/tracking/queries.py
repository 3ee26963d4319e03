"""Queries for the runs in an MLflow store."""

from dataclasses import dataclass
from functools import partial
from typing import Any

from mlflow.entities import Run as MlflowRun
from mlflow.entities import ViewType

from folio.errors import UserError
from folio.run import Record, kept
from folio.tracking.store import SYNC, Store, all_pages

# Tags of a training run: the MD5 of its history file once it has finished, the folio_id of the
# evaluation whose metrics it shows, and the params of that evaluation, each with this prefix.
HISTORY_MD5 = "history_md5"
EVALUATION_ID = "evaluation"
EVALUATE = "evaluate."
# The prefix of the experiment's tags that name removed runs by folio_id. MLflow's UI shows no tag
# that begins with `mlflow.`.
_REMOVED = "mlflow.folio.removed."


@dataclass(frozen=True, kw_only=True)
class TrackedRun:
    """A training run in MLflow."""

    id: str  # MLflow's run id
    folio_id: str
    name: str
    experiment: str  # the name of the DVC experiment, or ""
    status: str
    started: int  # ms since 1970
    ended: int | None
    params: dict[str, str]  # those of its evaluation included
    metrics: dict[str, float]  # the latest value of each
    tags: dict[str, str]

    @property
    def loss(self) -> float:
        """The validation loss of the run's model in nats/token; infinity if it has none."""
        return kept(self.metrics)[0]


def tracked_run(run: MlflowRun) -> TrackedRun:
    """Convert MLflow's representation of a training run."""
    tags = run.data.tags
    evaluate = {key: value for key, value in tags.items() if key.startswith(EVALUATE)}
    return TrackedRun(
        id=run.info.run_id,
        folio_id=tags.get("folio_id", ""),
        name=run.info.run_name,
        experiment=tags.get("dvc_experiment", ""),
        status=run.info.status,
        started=run.info.start_time,
        ended=run.info.end_time,
        params=run.data.params | evaluate,
        metrics=run.data.metrics,
        tags=tags,
    )


def status_of(run: MlflowRun) -> str:
    """The status of a run in MLflow, or DELETED if the user deleted it."""
    return "DELETED" if run.info.lifecycle_stage == "deleted" else run.info.status


def find(store: Store, folio_id: str) -> MlflowRun | None:
    """Find the run with the given folio_id, even if it was deleted."""
    found = store.client.search_runs(
        [store.experiment_id], f"tags.folio_id = '{folio_id}'", ViewType.ALL, max_results=1
    )
    return found[0] if found else None


def run_id(store: Store, folio_id: str) -> str:
    """The MLflow id of the run with the given folio_id. Raises UserError if there is none."""
    found = find(store, folio_id)
    if found is None:
        raise UserError(f"the run {folio_id} is not in MLflow: {SYNC} sends it")
    return found.info.run_id


def all_runs(store: Store) -> dict[str, MlflowRun]:
    """Every run in the store, including deleted ones, by folio_id."""
    search = partial(store.client.search_runs, [store.experiment_id], run_view_type=ViewType.ALL)
    return {run.data.tags.get("folio_id", ""): run for run in all_pages(search)}


def statuses(store: Store) -> dict[str, str]:
    """The status of every run in the store, including deleted ones, by folio_id."""
    return {folio_id: status_of(run) for folio_id, run in all_runs(store).items()}


def removed(store: Store) -> dict[str, str]:
    """The runs that were removed, by folio_id, each with the note of `mark_removed`.

    They remain after MLflow has permanently deleted the runs, so that no clone sends them again:
    all members of a team see those of the store that they share.
    """
    tags = store.client.get_experiment(store.experiment_id).tags
    return {k.removeprefix(_REMOVED): note for k, note in tags.items() if k.startswith(_REMOVED)}


def mark_removed(store: Store, folio_id: str, note: str = "{}") -> None:
    """Record that a run was removed. Has no effect as long as the run is in MLflow."""
    store.client.set_experiment_tag(store.experiment_id, f"{_REMOVED}{folio_id}", note)


def unmark_removed(store: Store, folio_id: str) -> None:
    """Undo `mark_removed`."""
    store.client.delete_experiment_tag(store.experiment_id, f"{_REMOVED}{folio_id}")


def latest_steps(run: MlflowRun) -> dict[str, int]:
    """The step of the latest point of each metric."""
    return {metric.key: metric.step for metric in run.data.to_proto().metrics}


def list_runs(store: Store) -> list[TrackedRun]:
    """The training runs in the store, newest first."""
    newest_first = ["attributes.start_time DESC"]
    search = partial(store.client.search_runs, [store.experiment_id], order_by=newest_first)
    return [tracked_run(r) for r in all_pages(search) if "mlflow.parentRunId" not in r.data.tags]


def find_run(store: Store, name: str) -> TrackedRun:
    """The training run that `name` refers to.

    name: the MLflow id or its first characters (at least 4), the folio_id, the DVC experiment or
    the name of the run. Raises UserError unless there is exactly one such run.
    """
    if not name:
        raise UserError("the name of a run is missing: `python -m folio compare` lists all runs")
    runs = list_runs(store)
    exact = [run for run in runs if name in (run.id, run.folio_id, run.name, run.experiment)]
    found = exact or [run for run in runs if run.id.startswith(name) and len(name) > 3]
    if len(found) == 1:
        return found[0]
    ids = ", ".join(run.id for run in found)
    raise UserError(
        f"{len(found)} runs match {name!r}; use the id of one: {ids}"
        if found
        else f"there is no run {name!r} in MLflow: `python -m folio compare` lists all runs"
    )


def is_outdated(store: Store, record: Record, history: list[dict[str, Any]]) -> bool:
    """Whether an interrupted training run is out of date in MLflow.

    That is, whether it is missing, marked as running, or ends before the last row of the history.
    """
    found = find(store, record.id)
    if found is None or status_of(found) == "RUNNING":
        return True
    if status_of(found) not in ("KILLED", "FAILED") or not history:
        return False
    last = history[-1]
    key = "train_loss" if last["step"] else "val_loss"  # step 0 has no train_loss
    return latest_steps(found).get(key, -1) < last["step"]


def loss_history(store: Store, run_id: str) -> list[dict[str, Any]]:
    """The training and validation losses of a run by step, as rows like those of a history."""
    rows: dict[int, dict[str, Any]] = {}
    for key in ("train_loss", "val_loss"):
        for point in store.client.get_metric_history(run_id, key):
            rows.setdefault(point.step, {"step": point.step})[key] = point.value
    return [rows[step] for step in sorted(rows)]
