"""Writing runs to an MLflow store, idempotently."""

from pathlib import Path
from typing import Any

from mlflow.data.code_dataset_source import CodeDatasetSource
from mlflow.entities import Dataset, DatasetInput, InputTag, Metric, Param, RunTag

from folio.run import RECORD, Record, Run, now_ms
from folio.tracking import registry
from folio.tracking.queries import find, run_id, status_of
from folio.tracking.store import Store, exclusive

_MAX_BATCH = 1000  # metrics in one call of log_batch
_MAX_PARAM = 6000  # characters in the value of a param


class RunWriter:
    """Sends runs to a store. Its methods raise STORE_ERRORS.

    Sending is idempotent: runs are identified by their folio_id, the store ignores exact repeats of
    a point, and an artifact of the same size is not uploaded again.
    """

    def __init__(self, store: Store):
        self._store, self._client = store, store.client
        self._opened: dict[
            str, str
        ] = {}  # folio_id -> MLflow's run id, once params and tags are sent

    def send(self, run: Run, status: str, stopped: str | None = None) -> None:
        """Bring the store up to date with the run. Its status is changed last.

        stopped: why the run ended early, if it did. Raises UserError if the run's parent is not in
        the store.
        """
        record = run.record
        with exclusive():
            id = self._opened.get(record.id) or self._open(record)
            self._opened[record.id] = id
            points = _points(run.history)
            for i in range(0, len(points), _MAX_BATCH):
                self._client.log_batch(id, metrics=points[i : i + _MAX_BATCH])
            self._log_summary(id, run)
            if record.parent:
                self._update_parent(run, record.parent)
            for path, folder in run.files:
                self._upload(id, path, folder)
            if run.model:
                registry.log(self._store, id, run.model, record.tags["weights_sha256"])
            tags = record.tags | ({"stopped": stopped} if stopped else {}) | _description(run)
            self._client.log_batch(id, tags=[RunTag(*tag) for tag in tags.items()])
            if status != "RUNNING":
                self._client.set_terminated(id, status, record.ended or now_ms())

    def complete(self, run: Run) -> None:
        """Send a finished run, unless the store has all of it or the user deleted it there."""
        found, parent = find(self._store, run.record.id), run.record.parent
        above = find(self._store, parent) if parent else None
        if any(there and status_of(there) == "DELETED" for there in (found, above)):
            return
        if found is None or found.info.status != "FINISHED":
            self.send(run, "FINISHED")
        elif parent:
            self._update_parent(run, parent)

    def _update_parent(self, run: Run, folio_id: str) -> None:
        """Log a run's summary and its parent_files to the parent run too."""
        id = run_id(self._store, folio_id)
        self._log_summary(id, run)
        for path, folder in run.parent_files:
            self._upload(id, path, folder)

    def _open(self, record: Record) -> str:
        """Create or reopen the record's run, log its params and tags, and return MLflow's id."""
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
            params=[Param(key, value[:_MAX_PARAM]) for key, value in params.items()],
            tags=[RunTag(*tag) for tag in tags.items()],
        )
        if "data_digest" in record.tags:
            self._client.log_inputs(id, [_dataset(record)])
        return id

    def _log_summary(self, id: str, run: Run) -> None:
        """Log a run's summary, except the metrics that are already in the store."""
        logged = self._client.get_run(id).data.metrics
        when, step = run.record.ended or run.record.started, int(run.summary.get("steps", 0))
        new = {name: value for name, value in run.summary.items() if logged.get(name) != value}
        self._client.log_batch(id, [Metric(*point, when, step) for point in new.items()])

    def _upload(self, id: str, path: Path, folder: str) -> None:
        """Upload a file, or the files in a folder, to `folder` of a run's artifacts.

        Omits the record, whose content is the run itself, hidden files, which a killed process may
        have left incomplete, and files that do not exist: runs of an earlier Folio have no
        models/evaluation/loss.png.
        """
        top = path if path.is_dir() else path.parent
        files = [f for f in (path.rglob("*") if path.is_dir() else [path]) if f.is_file()]
        files = [f for f in files if f.name != RECORD and not f.name.startswith(".")]
        sizes: dict[str, dict[str, int | None]] = {}  # of the artifacts in the store, by folder
        for file in files:
            place = (Path(folder) / file.relative_to(top)).parent.as_posix()
            if place not in sizes:
                listed = self._client.list_artifacts(id, place)
                sizes[place] = {Path(item.path).name: item.file_size for item in listed}
            if sizes[place].get(file.name) != file.stat().st_size:
                self._client.log_artifact(id, str(file), place)


def _points(history: list[dict[str, Any]]) -> list[Metric]:
    """The metrics in the rows of a history."""
    return [
        Metric(key, value, row["time"], row["step"])
        for row in history
        for key, value in row.items()
        if key not in ("step", "time")
    ]


def _dataset(record: Record) -> DatasetInput:
    """The training's dataset, as MLflow's UI shows it: the corpus and its digest."""
    name, digest = record.params["data.corpus"], record.tags["data_digest"][:32]
    source = CodeDatasetSource({"mlflow.source.name": "stages/prepare.py"}).to_json()
    return DatasetInput(
        Dataset(name, digest, "code", source), [InputTag("mlflow.data.context", "training")]
    )


def _description(run: Run) -> dict[str, str]:
    """The note that MLflow's UI shows on the page of a finished training run."""
    if "best_val_loss" not in run.summary:
        return {}
    p, summary = run.record.params, run.summary
    text = (
        f"**Validation loss {summary['best_val_loss']:.4f}** nats/token, at step"
        f" {summary['best_step']:,.0f} of {summary['steps']:,.0f}; final training loss"
        f" {summary['last_train_loss']:.4f}. {p.get('model.n_layer')} layers,"
        f" {p.get('model.n_head')} heads, width {p.get('model.n_embd')}, context"
        f" {p.get('model.block_size')}, {summary['parameters'] / 1e6:.1f} M parameters, trained on"
        f" {p.get('data.corpus')}."
    )
    if experiment := run.record.tags.get("dvc_experiment"):
        text += f" `dvc exp apply {experiment}` restores its files."
    return {"mlflow.note.content": text}
