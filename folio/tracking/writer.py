"""Writing runs to an MLflow store. Everything may be sent again without being there twice."""

from pathlib import Path
from typing import Any

from mlflow.data.code_dataset_source import CodeDatasetSource
from mlflow.entities import Dataset, DatasetInput, InputTag, Metric, Param, RunTag

from folio.run import RECORD, Record, Run, now_ms
from folio.tracking import registry
from folio.tracking.queries import find, run_id, status_of
from folio.tracking.store import Store, exclusive

_BATCH = 1000  # metrics in one log_batch call, at most
_MAX_PARAM = 6000  # characters of a param's value


class RunWriter:
    """Sends runs to a store; its methods raise STORE_ERRORS.

    Sending is idempotent: a run is found by its folio_id, the store drops exact repeats of a point,
    and an artifact of the same size is not uploaded again.
    """

    def __init__(self, store: Store):
        self._store, self._client = store, store.client
        self._opened: dict[str, str] = {}  # folio_id -> run id, once params and tags are sent

    def send(self, run: Run, status: str, stopped: str | None = None) -> None:
        """Bring the store up to date with the run; its status is changed last.

        stopped: why the run ended early, where it did.
        """
        record = run.record
        with exclusive():
            id = self._opened.get(record.id) or self._open(record)
            self._opened[record.id] = id
            points = _points(run.history)
            for i in range(0, len(points), _BATCH):
                self._client.log_batch(id, metrics=points[i : i + _BATCH])
            self._log_summary(id, run)
            if record.parent:
                parent = run_id(self._store, record.parent)
                self._log_summary(parent, run)
                for path, folder in run.parent_files:
                    self._upload(parent, path, folder)
            for path, folder in run.files:
                self._upload(id, path, folder)
            if run.model:
                registry.log(self._store, id, run.model, record.tags["weights_sha256"])
            tags = record.tags | ({"stopped": stopped} if stopped else {}) | _description(run)
            self._client.log_batch(id, tags=[RunTag(*tag) for tag in tags.items()])
            if status != "RUNNING":
                self._client.set_terminated(id, status, record.ended or now_ms())

    def complete(self, run: Run) -> None:
        """Send a finished run, unless the store has all of it or the user deleted it."""
        found, parent = find(self._store, run.record.id), run.record.parent
        above = find(self._store, parent) if parent else None
        if any(there and status_of(there) == "DELETED" for there in (found, above)):
            return
        if found is None or found.info.status != "FINISHED":
            self.send(run, "FINISHED")
        elif parent:
            self._log_summary(run_id(self._store, parent), run)

    def _open(self, record: Record) -> str:
        """The id of the record's run, created or reopened, with its params and tags."""
        tags = record.tags | {"folio_id": record.id}
        if record.parent:
            tags["mlflow.parentRunId"] = run_id(self._store, record.parent)
        params = record.params
        found = find(self._store, record.id)
        if found is None:
            experiment = self._store.experiment_id
            found = self._client.create_run(experiment, record.started, tags, record.name)
        else:  # a resumed training
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
        """Log the metrics that sum a run up, except those that the store has."""
        logged = self._client.get_run(id).data.metrics
        when, step = run.record.ended or run.record.started, int(run.summary.get("steps", 0))
        new = {name: value for name, value in run.summary.items() if logged.get(name) != value}
        self._client.log_batch(id, [Metric(*point, when, step) for point in new.items()])

    def _upload(self, id: str, path: Path, folder: str) -> None:
        """Upload a file, or the files in a folder, to `folder` of the run's artifacts.

        Leaves out the record, whose content is the run itself, and files that a kill left half
        written.
        """
        top = path if path.is_dir() else path.parent
        files = [f for f in path.rglob("*") if f.is_file()] if path.is_dir() else [path]
        files = [f for f in files if f.name != RECORD and not f.name.startswith(".")]
        sizes: dict[str, dict[str, int]] = {}  # of the artifacts in the store, by folder
        for file in files:
            place = (Path(folder) / file.relative_to(top)).parent.as_posix()
            if place not in sizes:
                listed = self._client.list_artifacts(id, place)
                sizes[place] = {Path(item.path).name: item.file_size for item in listed}
            if sizes[place].get(file.name) != file.stat().st_size:
                self._client.log_artifact(id, str(file), place)


def _points(history: list[dict[str, Any]]) -> list[Metric]:
    return [
        Metric(key, value, row["time"], row["step"])
        for row in history
        for key, value in row.items()
        if key not in ("step", "time")
    ]


def _dataset(record: Record) -> DatasetInput:
    name, digest = record.params["data.corpus"], record.tags["data_digest"][:32]
    source = CodeDatasetSource({"mlflow.source.name": "stages/prepare.py"}).to_json()
    return DatasetInput(
        Dataset(name, digest, "code", source), [InputTag("mlflow.data.context", "training")]
    )


def _description(run: Run) -> dict[str, str]:
    """The note that MLflow's UI shows on a finished training run."""
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
