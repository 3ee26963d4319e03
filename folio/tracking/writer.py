"""Writes runs to an MLflow store, idempotently."""

import math
import sys
from pathlib import Path
from typing import Any

from mlflow.data.code_dataset_source import CodeDatasetSource
from mlflow.entities import Dataset, DatasetInput, InputTag, LoggedModel, Metric, Param, RunTag
from mlflow.entities import Run as MlflowRun

from folio import files, signals
from folio.errors import UserError
from folio.gpt import weight_files
from folio.run import MODEL, RECORD, Record, Run, kept, now_ms
from folio.tracking import logged_models, queries
from folio.tracking.artifacts import Artifacts
from folio.tracking.queries import EVALUATE, EVALUATION_ID, HISTORY_MD5, find, run_id, status_of
from folio.tracking.store import Store

_MAX_BATCH = 1000  # metrics in one call of log_batch


class RunWriter:
    """Sends runs to a store. Its methods raise STORE_ERRORS.

    Sending is idempotent: runs are identified by their folio_id, a metric gets one point per step,
    and an artifact that is already in the store is not uploaded again.
    """

    def __init__(self, store: Store):
        self._store, self._client = store, store.client
        # folio_id -> MLflow's run id, once params and tags are sent
        self._opened: dict[str, str] = {}
        self._rows: dict[str, int] = {}  # MLflow's run id -> rows of its history that were sent

    def send(self, run: Run, status: str, stopped: str | None = None) -> None:
        """Bring the store up to date with the run. The run's status is updated last.

        stopped: the reason why the run ended early, if it did. If another copy of this project has
        already sent the finished run, the store is left unchanged. Raises UserError if the run's
        parent is not in the store, or if its model is damaged.
        """
        record = run.record
        _check_model(run)
        with self._store.exclusive():
            if self._is_finished_elsewhere(run):
                return
            id = self._opened.get(record.id) or self._open(record)
            self._opened[record.id] = id
            found = self._client.get_run(id)
            if run.history_md5 and self._has_other_points(found, run.history):
                found = self._replace(found, record)
                id = self._opened[record.id] = found.info.run_id
            self._log_points(found, run.history)
            artifacts = self._artifacts(found)
            for path, folder in run.files:
                self._upload(id, artifacts, path, folder)
            model = None
            if run.model:
                model = logged_models.log(self._store, id, run.model, record)
            self._log_summary(found, run, model)
            tags = record.tags | ({"stopped": stopped} if stopped else {}) | _description(run)
            if run.history_md5:
                tags |= {HISTORY_MD5: run.history_md5}
            self._client.log_batch(id, tags=[RunTag(*tag) for tag in tags.items()])
            if status != "RUNNING":
                self._client.set_terminated(id, status, record.ended or now_ms())

    def complete(self, run: Run) -> None:
        """Send a finished run, unless it is complete in the store or was deleted there.

        The metrics of an evaluation are also logged to its training run.
        """
        found, parent = find(self._store, run.record.id), run.record.parent
        above = find(self._store, parent) if parent else None
        if any(there and status_of(there) == "DELETED" for there in (found, above)):
            return
        if not found or (parent and not above):
            removed = queries.removed(self._store)
            if run.record.id in removed or (not above and parent in removed):
                return
        with signals.deferred():  # a stop request would leave the status RUNNING
            if found is None or found.info.status != "FINISHED":
                self.send(run, "FINISHED")
            if parent:
                self.update_parent(run)
        signals.check()

    def update_parent(self, evaluation: Run) -> None:
        """Also log an evaluation's metrics and parent_files to its training run.

        Tags of the training run identify the evaluation and contain its params. Raises UserError if
        the training run is not in the store.
        """
        record = evaluation.record
        with self._store.exclusive():
            found = self._client.get_run(run_id(self._store, record.parent or ""))
            id, tags = found.info.run_id, found.data.tags
            model = logged_models.find_ready(self._store, id)
            self._log_summary(found, evaluation, model)
            new = {key: value[: logged_models.MAX_PARAM] for key, value in record.params.items()}
            new |= {EVALUATION_ID: record.id}
            for key in tags.keys() - new.keys():
                if key.startswith(EVALUATE):  # a param of an evaluation by an earlier version
                    self._client.delete_tag(id, key)
            changed = [RunTag(*tag) for tag in new.items() - tags.items()]
            self._client.log_batch(id, tags=changed)
            for path, folder in evaluation.parent_files:
                self._upload(id, self._artifacts(found), path, folder)

    def _is_finished_elsewhere(self, run: Run) -> bool:
        """Whether another copy of the project has finished this training run.

        That happens if the project was copied during training. The times in the two histories
        differ, so points from both would be duplicates.
        """
        found = find(self._store, run.record.id)
        if found is None or status_of(found) != "FINISHED":
            return False
        return found.data.tags.get(HISTORY_MD5) not in (None, run.history_md5)

    def _open(self, record: Record) -> str:
        """Create or reopen the record's run, log its params and tags, and return its MLflow id."""
        tags = record.tags | {"folio_id": record.id}
        if record.parent:
            tags["mlflow.parentRunId"] = run_id(self._store, record.parent)
        params = record.params
        found = find(self._store, record.id)
        if found is None:
            experiment = self._store.experiment_id
            found = self._client.create_run(experiment, record.started, tags, record.name)
        else:  # a resumed or repeated run
            if status_of(found) == "DELETED":
                self._client.restore_run(found.info.run_id)
            params = {key: params[key] for key in params.keys() - found.data.params.keys()}
            if "stopped" in found.data.tags:
                self._client.delete_tag(found.info.run_id, "stopped")
            self._client.update_run(found.info.run_id, "RUNNING", record.name)
        id = found.info.run_id
        self._client.log_batch(
            id,
            params=[Param(key, value[: logged_models.MAX_PARAM]) for key, value in params.items()],
            tags=[RunTag(*tag) for tag in tags.items()],
        )
        if "data_digest" in record.tags:
            self._client.log_inputs(id, [_dataset(record)])
        return id

    def _has_other_points(self, found: MlflowRun, history: list[dict[str, Any]]) -> bool:
        """Whether a run that is about to finish has points that are not in its history, for example
        from another copy of the project."""
        if HISTORY_MD5 in found.data.tags:  # it had finished before
            return False
        own = {(row["step"], row["time"]) for row in history}
        return any(
            (point.step, point.timestamp) not in own
            for key in found.data.metrics.keys() & {"train_loss", "val_loss"}  # one is in each row
            for point in self._client.get_metric_history(found.info.run_id, key)
        )

    def _replace(self, found: MlflowRun, record: Record) -> MlflowRun:
        """Delete a run and return a new one for the record: MLflow cannot delete single points."""
        self._client.delete_tag(found.info.run_id, "folio_id")
        self._client.delete_run(found.info.run_id)
        return self._client.get_run(self._open(record))

    def _log_points(self, found: MlflowRun, history: list[dict[str, Any]]) -> None:
        """Log the points of a history, except those already in the store for that metric and step.

        If the process was killed, or the project was copied during training, the store may contain
        points that this process did not send.
        """
        id, latest = found.info.run_id, queries.latest_steps(found)
        points = _points(history[self._rows.get(id, 0) :])
        keys = {point.key for point in points if point.step <= latest.get(point.key, -1)}
        steps = {key: {p.step for p in self._client.get_metric_history(id, key)} for key in keys}
        points = [point for point in points if point.step not in steps.get(point.key, ())]
        for i in range(0, len(points), _MAX_BATCH):
            self._client.log_batch(id, metrics=points[i : i + _MAX_BATCH])
        self._rows[id] = len(history)

    def _log_summary(self, found: MlflowRun, run: Run, model: LoggedModel | None) -> None:
        """Make MLflow show a run's summary, whatever was logged before, and link it to the model.

        A run shows the point with the highest step and, among several, the one with the latest
        time; a model shows the latest of the points linked to it. So a new value gets a step and a
        time that are later than those in the store, even if the clock has been set back since. A
        value that the run shows already is linked by logging the same point again, which MLflow
        does not store twice.
        """
        id, logged = found.info.run_id, found.data.metrics
        linked = logged_models.linked_metrics(model) if model else run.summary
        when, step = run.record.ended or run.record.started, int(run.summary.get("steps", 0))
        metrics = []
        for name, value in run.summary.items():
            shown = name in logged and is_same(logged[name], value)
            if shown and is_linked(linked, name, value):
                continue
            points = self._client.get_metric_history(id, name) if name in logged else []
            places = [(point.step, point.timestamp) for point in points]
            place = max(places) if shown else _after(places, step, when)
            model_id = model.model_id if model else None
            metrics.append(Metric(name, value, place[1], place[0], model_id))
        self._client.log_batch(id, metrics)

    def _artifacts(self, found: MlflowRun) -> Artifacts:
        return Artifacts(found.info.artifact_uri, self._store.uri)

    def _upload(self, id: str, artifacts: Artifacts, path: Path, folder: str) -> None:
        """Upload a file, or the files in a folder, to `folder` among a run's artifacts.

        Skips the record, which the run itself represents, hidden files, which may be incomplete
        after a kill, and missing files: earlier versions wrote no models/evaluation/loss.png.
        """
        top = path if path.is_dir() else path.parent
        for file in path.rglob("*") if path.is_dir() else [path]:
            if not file.is_file() or not is_artifact(file.name):
                continue
            place = Path(folder) / file.relative_to(top)
            if not artifacts.has(place.as_posix(), file.stat().st_size, files.md5(file)):
                self._client.log_artifact(id, str(file), place.parent.as_posix())


def is_artifact(name: str) -> bool:
    """Whether a file in a run's folder is uploaded, given its name."""
    return name != RECORD and not name.startswith(".")


def is_same(logged: float, value: float) -> bool:
    """Whether a logged metric has the given value. MLflow stores infinity as the largest float."""
    stored = min(max(value, -sys.float_info.max), sys.float_info.max)
    return logged == stored or (math.isnan(logged) and math.isnan(value))


def _after(places: list[tuple[int, int]], step: int, when: int) -> tuple[int, int]:
    """The first step and time, at or after the given ones, that are later than all places."""
    return max([step, *(s for s, _ in places)]), max([when, *(t + 1 for _, t in places)])


def is_linked(linked: dict[str, float], name: str, value: float) -> bool:
    """Whether a metric, of which NaN cannot be linked, is among those linked to a model."""
    return math.isnan(value) or (name in linked and is_same(linked[name], value))


def _check_model(run: Run) -> None:
    """Raise UserError if a run's model is not the one that was saved at the end of training."""
    digest = run.record.tags.get("weights_sha256", "")
    if run.model and not weight_files.has_sha256(run.model, digest):
        raise UserError(
            f"the weights of {run.record.name} in {MODEL} are damaged: their checksum does not"
            " match the record; `dvc repro --force train` trains the model again"
        )


def _points(history: list[dict[str, Any]]) -> list[Metric]:
    """The metrics in the rows of a history."""
    return [
        Metric(key, value, row["time"], row["step"])
        for row in history
        for key, value in row.items()
        if key not in ("step", "time")
    ]


def _dataset(record: Record) -> DatasetInput:
    """The dataset that MLflow's UI shows for a training run: the corpus and its digest."""
    name = record.params.get("data.corpus", "unknown")
    digest = record.tags["data_digest"][:32]
    source = CodeDatasetSource({"mlflow.source.name": "stages/prepare.py"}).to_json()
    return DatasetInput(
        Dataset(name, digest, "code", source), [InputTag("mlflow.data.context", "training")]
    )


def _description(run: Run) -> dict[str, str]:
    """The description that MLflow's UI shows on the page of a finished training run."""
    p, summary = run.record.params, run.summary
    if not {"best_val_loss", "best_step", "steps", "last_train_loss", "parameters"} <= set(summary):
        return {}
    (loss, step), best_step = kept(summary), summary["best_step"]
    best = f"; best evaluation {summary['best_val_loss']:.4f} at step {best_step:,.0f}"
    text = (
        f"**Validation loss {loss:.4f}** nats/token, at step {step:,.0f} of {summary['steps']:,.0f}"
        f"{best if step != best_step else ''}; final training loss"
        f" {summary['last_train_loss']:.4f}. {p.get('model.n_layer')} layers,"
        f" {p.get('model.n_head')} heads, width {p.get('model.n_embd')}, context"
        f" {p.get('model.block_size')}, {summary['parameters'] / 1e6:.1f} M parameters,"
        f" trained on {p.get('data.corpus')}."
    )
    if experiment := run.record.tags.get("dvc_experiment"):
        text += f" `dvc exp apply {experiment}` restores its files."
    return {"mlflow.note.content": text}
