"""MLflow, and the only file that knows it. Tracking never stops the work it tracks."""

import contextlib
import logging
import math
import os
import sqlite3
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
# A server that is away is given up on at once; MLflow's own settings wait for minutes. And a
# request that is repeated after its answer was lost would make a run twice.
os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "10")
os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")

import filelock
import mlflow
from mlflow.data.code_dataset_source import CodeDatasetSource
from mlflow.entities import Dataset, DatasetInput, InputTag, Metric, Param, RunTag, ViewType
from mlflow.entities import Run as MlflowRun
from mlflow.exceptions import MlflowException
from mlflow.system_metrics.metrics.cpu_monitor import CPUMonitor
from mlflow.system_metrics.metrics.disk_monitor import DiskMonitor
from mlflow.system_metrics.metrics.gpu_monitor import GPUMonitor
from mlflow.system_metrics.metrics.network_monitor import NetworkMonitor
from mlflow.tracking.context import registry as contexts
from sqlalchemy.exc import SQLAlchemyError

from folio import records, registry, view
from folio.errors import UserError
from folio.records import Record, Run

logging.getLogger("mlflow").setLevel(logging.WARNING)  # tables made, monitors started

EXPERIMENT = "folio"
Refused = (MlflowException, SQLAlchemyError, sqlite3.Error, OSError)  # what a store may raise
SYNC = "`python -m folio sync`"
LACKING = f"MLflow lacks a part of this run: {SYNC} sends it"
_BATCH = 1000  # metrics that one log_batch call may hold
_LONGEST = 6000  # characters that a param may have

# Where a local store keeps addresses of artifacts: (table, column).
_ADDRESSES = (
    ("experiments", "artifact_location"),
    ("runs", "artifact_uri"),
    ("logged_models", "artifact_location"),
    ("model_versions", "source"),
    ("model_versions", "storage_location"),
)


def project_root() -> Path:
    """Where the store and the checkpoints are: DVC's root, even in an experiment's own copy."""
    return Path(os.environ.get("DVC_ROOT") or Path.cwd()).resolve()


def run_name(name: str) -> str:
    """The name, behind that of the DVC experiment which the run is part of."""
    return " ".join(filter(None, [os.environ.get("DVC_EXP_NAME"), name]))


def context(source: str) -> dict[str, str]:
    """Tags that say who runs what: user, git commit, DVC experiment and the commit it is from."""
    names = {"dvc_experiment": "DVC_EXP_NAME", "dvc_baseline": "DVC_EXP_BASELINE_REV"}
    dvc = {tag: os.environ[name] for tag, name in names.items() if os.environ.get(name)}
    return contexts.resolve_tags() | {"mlflow.source.name": source} | dvc


@dataclass(frozen=True, kw_only=True)
class Kept:
    """A training as MLflow keeps it."""

    id: str  # MLflow's
    folio_id: str
    name: str
    experiment: str  # DVC's
    status: str
    started: int  # ms since 1970
    ended: int | None
    params: dict[str, str]
    metrics: dict[str, float]  # the last value of each
    tags: dict[str, str]

    @property
    def loss(self) -> float:
        """The best held-out loss, nats a token; infinite where there is none."""
        return self.metrics.get("best_val_loss", math.inf)


class Store:
    """A tracking store with the project's experiment in it. Its methods raise what MLflow raises.

    Whatever is sent twice is there once: a run is known by its folio_id, the store drops exact
    repeats of a point, and an artifact of the same size is not sent again.
    """

    def __init__(self, address: str | None, mend: bool = False):
        """address: MLFLOW_TRACKING_URI where that is set; None is mlflow.db at the project's root.

        mend: where the project's folder was moved, put the new place into the store's addresses.
        Raises UserError otherwise.
        """
        self.address = _address(address)
        self._file = _file_of(self.address)
        if self._file:
            self.address = f"sqlite:///{self._file}"
        self._opened: dict[str, str] = {}  # folio_id -> MLflow's run id, with params and tags sent
        with exclusive():
            if self._file and not self._file.exists():
                _make_store(self._file)
            self._client = mlflow.MlflowClient(self.address)
            self._experiment = self._open_experiment(mend)

    @classmethod
    def existing(cls, address: str | None) -> "Store":
        """The store, to read it. Raises UserError where there is none, or it does not answer."""
        if not has_store(address):
            raise UserError(f"there is no MLflow store yet: `dvc repro` makes one, or {SYNC}")
        try:
            return cls(address)
        except Refused as problem:
            raise UserError(f"MLflow does not answer: {reason(problem)}") from None

    def send(self, run: Run, status: str, stopped: str | None = None) -> None:
        """Bring the store up to date with the run; its status is changed last.

        stopped: what ended it early, where something did.
        """
        record = run.record
        with exclusive():
            run_id = self._opened.get(record.id) or self._open(record)
            self._opened[record.id] = run_id
            points = _points(run.history)
            for i in range(0, len(points), _BATCH):
                self._client.log_batch(run_id, metrics=points[i : i + _BATCH])
            self._sum_up(run_id, run)
            if record.parent:
                self._sum_up(self._id_of(record.parent), run)
            for path, folder in run.files:
                self._upload(run_id, path, folder)
            if run.model:
                digest = record.tags["weights_sha256"]
                registry.log(self._client, self._experiment, run_id, run.model, digest)
            tags = record.tags | ({"stopped": stopped} if stopped else {}) | _description(run)
            self._client.log_batch(run_id, tags=[RunTag(*tag) for tag in tags.items()])
            if status != "RUNNING":
                self._client.set_terminated(run_id, status, record.ended or records.now())

    def complete(self, run: Run) -> None:
        """Send a run that is over, unless all of it is there."""
        found, parent = self._find(run.record.id), run.record.parent
        above = self._find(parent) if parent else None
        if any(there and _status(there) == "DELETED" for there in (found, above)):
            return  # by the user, in MLflow's page
        if found is None or found.info.status != "FINISHED":
            self.send(run, "FINISHED")
        elif parent:
            self._sum_up(self._id_of(parent), run)

    def statuses(self) -> dict[str, str]:
        """The status of each run that came from Folio, by its folio_id; DELETED is one, too."""
        found, token = {}, None
        while token is None or token:
            page = self._client.search_runs(
                [self._experiment], run_view_type=ViewType.ALL, page_token=token
            )
            found |= {run.data.tags.get("folio_id", ""): _status(run) for run in page}
            token = page.token or ""
        return found

    def without_model(self) -> set[str]:
        """The folio_ids of the trainings that are over and have no model here."""
        ready = registry.ready(self._client, self._experiment)
        return {r.folio_id for r in self.runs() if r.status == "FINISHED" and r.id not in ready}

    def lacks(self, record: Record, history: list[dict[str, Any]]) -> bool:
        """Whether a training that was cut short is not there as far as it got, or as running."""
        found = self._find(record.id)
        if found is None or _status(found) == "RUNNING":
            return True
        stopped, last = _status(found) in ("KILLED", "FAILED"), history[-1] if history else {}
        key = "train_loss" if last.get("step") else "val_loss"  # what the row of step 0 has
        return stopped and found.data.metrics.get(key) != last.get(key)

    def runs(self) -> list[Kept]:
        """The trainings in the store, the newest first."""
        found, token = [], None
        while token is None or token:
            page = self._client.search_runs(
                [self._experiment], order_by=["attributes.start_time DESC"], page_token=token
            )
            found += [_kept(run) for run in page if "mlflow.parentRunId" not in run.data.tags]
            token = page.token or ""
        return found

    def run(self, name: str) -> Kept:
        """The training of that MLflow id, folio_id, DVC experiment or name, or of the beginning of
        an id. Raises UserError where there is none, or more than one."""
        if not name:
            raise UserError("which run? `python -m folio compare` lists them")
        runs = self.runs()
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

    def trained_models(self) -> list[tuple[str, str]]:
        """(label, name) of all that fetch_model gives: the champion, then a run each."""
        champion, version = self.champion()
        best = f"models:/{registry.NAME}@{registry.CHAMPION}"
        label = f"champion (version {version}, held-out {champion.loss:.3f})" if champion else ""
        first = [(label, best)] if champion else []
        ready = registry.ready(self._client, self._experiment)
        runs = [run for run in self.runs() if run.id in ready]
        return first + [(f"{run.name}, held-out {run.loss:.3f}", run.id) for run in runs]

    def register(self, run: Kept) -> str:
        """The number of the version that a training's model has under the name `folio`."""
        with exclusive():
            model_id = registry.of_run(self._client, self._experiment, run.id)
            if not model_id:
                raise UserError(f"{run.name} has no model in MLflow: {SYNC} sends what DVC keeps")
            about = f"{run.name}: held-out loss {run.loss:.4f} nats a token"
            return str(registry.register(self._client, run.id, model_id, about).version)

    def champion(self) -> tuple[Kept | None, str]:
        """The champion's training, None where it is there no more, and the number of its version,
        "" where there is none."""
        version = registry.champion(self._client)
        if version is None:
            return None, ""
        try:
            return _kept(self._client.get_run(version.run_id)), str(version.version)
        except MlflowException as problem:
            if not registry.is_absent(problem):
                raise
            return None, str(version.version)

    def check_registered(self, name: str) -> None:
        """Raises UserError where models:/NAME@ALIAS or models:/NAME/VERSION names nothing."""
        registry.registered(self._client, name)

    def crown(self, version: str) -> None:
        registry.crown(self._client, version)

    def fetch_model(self, name: str, folder: Path) -> Path:
        """Copy a model under `folder`: that of models:/NAME@ALIAS or models:/NAME/VERSION, or of a
        training, named as `run` takes it. Returns the Hugging Face folder. Raises UserError."""
        if name.startswith("models:/"):
            model_id = registry.registered(self._client, name)
        else:
            run = self.run(name)
            model_id = registry.of_run(self._client, self._experiment, run.id)
        if not model_id:
            raise UserError(f"{name} has no model in MLflow: {SYNC} sends what DVC keeps")
        return registry.fetch(self._client, model_id, folder)

    def losses(self, name: str) -> list[dict[str, Any]]:
        """The training and held-out losses by step of what fetch_model takes, as a history has
        them. Raises UserError."""
        if name.startswith("models:/"):
            model_id = registry.registered(self._client, name)
            run_id = self._client.get_logged_model(model_id).source_run_id
        else:
            run_id = self.run(name).id
        rows: dict[int, dict[str, Any]] = {}
        for key in ("train_loss", "val_loss"):
            for point in self._client.get_metric_history(run_id, key):
                rows.setdefault(point.step, {"step": point.step})[key] = point.value
        return [rows[step] for step in sorted(rows)]

    def _open(self, record: Record) -> str:
        """MLflow's id of the record's run, which is made where it is missing."""
        tags = record.tags | {"folio_id": record.id}
        if record.parent:
            tags["mlflow.parentRunId"] = self._id_of(record.parent)
        params = record.params
        found = self._find(record.id)
        if found is None:
            found = self._client.create_run(self._experiment, record.started, tags, record.name)
        else:  # a training that goes on
            if _status(found) == "DELETED":
                self._client.restore_run(found.info.run_id)
            params = {key: params[key] for key in params.keys() - found.data.params.keys()}
            if "stopped" in found.data.tags:
                self._client.delete_tag(found.info.run_id, "stopped")
            self._client.update_run(found.info.run_id, "RUNNING", record.name)
        run_id = found.info.run_id
        self._client.log_batch(
            run_id,
            params=[Param(key, value[:_LONGEST]) for key, value in params.items()],
            tags=[RunTag(*tag) for tag in tags.items()],
        )
        if "data_digest" in record.tags:
            self._client.log_inputs(run_id, [_dataset(record)])
        return run_id

    def _find(self, folio_id: str) -> MlflowRun | None:
        found = self._client.search_runs(
            [self._experiment], f"tags.folio_id = '{folio_id}'", ViewType.ALL, max_results=1
        )
        return found[0] if found else None

    def _id_of(self, folio_id: str) -> str:
        found = self._find(folio_id)
        if found is None:
            raise UserError(f"the run of the training {folio_id} is not there: {SYNC} sends it")
        return found.info.run_id

    def _sum_up(self, run_id: str, run: Run) -> None:
        """Log the figures of a run, but for those that are there."""
        there = self._client.get_run(run_id).data.metrics
        when, step = run.record.ended or run.record.started, int(run.figures.get("steps", 0))
        new = {name: value for name, value in run.figures.items() if there.get(name) != value}
        self._client.log_batch(run_id, [Metric(*point, when, step) for point in new.items()])

    def _upload(self, run_id: str, path: Path, folder: str) -> None:
        """Send a file, or a folder's files but for the record, to `folder` of the artifacts."""
        top = path if path.is_dir() else path.parent
        files = [f for f in path.rglob("*") if f.is_file()] if path.is_dir() else [path]
        # Not the record, for what it says is the run itself, nor what a kill left half-written.
        files = [f for f in files if f.name != records.FILE and not f.name.startswith(".")]
        there: dict[str, dict[str, int]] = {}  # the sizes of what is there, folder by folder
        for file in files:
            place = (Path(folder) / file.relative_to(top)).parent.as_posix()
            if place not in there:
                listed = self._client.list_artifacts(run_id, place)
                there[place] = {Path(item.path).name: item.file_size for item in listed}
            if there[place].get(file.name) != file.stat().st_size:
                self._client.log_artifact(run_id, str(file), place)

    def _open_experiment(self, mend: bool) -> str:
        """Its id. The client makes it: one that `mlflow ui` makes takes no artifacts from here."""
        place = _artifacts(self._file) if self._file else None
        experiment = self._client.get_experiment_by_name(EXPERIMENT)
        if experiment is None:
            try:
                return self._client.create_experiment(EXPERIMENT, place, view.tags())
            except MlflowException:  # another client has made it just now
                return self._client.get_experiment_by_name(EXPERIMENT).experiment_id
        for key, value in view.tags().items():
            if key not in experiment.tags or (key == view.TAG and experiment.tags[key] != value):
                self._client.set_experiment_tag(experiment.experiment_id, key, value)
        if experiment.lifecycle_stage == "deleted":
            way_out = f"`mlflow experiments restore --experiment-id {experiment.experiment_id}`"
            raise UserError(f"MLflow's experiment {EXPERIMENT} was deleted: {way_out} helps")
        former = experiment.artifact_location
        if self._file and former != place and former.endswith("/mlruns"):
            if not mend:
                raise UserError(
                    f"{self._file.name} was made for {former}, and the project has been moved"
                    f" since: {SYNC} mends its addresses"
                )
            _readdress(self._file, former, place)
        return experiment.experiment_id


class Load:
    """The machine's load as MLflow's own monitors measure it: CPU, memory, disk, network, GPU."""

    SECONDS = 5.0  # between two readings at least

    def __init__(self):
        self._monitors = []
        for kind in (CPUMonitor, DiskMonitor, NetworkMonitor, GPUMonitor):
            with contextlib.suppress(Exception):  # no such thing here, or no way to ask it
                self._monitors.append(kind())
        self._read = time.monotonic()

    def read(self) -> dict[str, float]:
        """Metrics by the names under which MLflow shows them; {} where it is too early."""
        if time.monotonic() - self._read < self.SECONDS:
            return {}
        self._read = time.monotonic()
        load = {}
        for monitor in self._monitors:
            with contextlib.suppress(Exception):
                monitor.collect_metrics()
            found = monitor.aggregate_metrics()
            load |= {f"system/{name}": value for name, value in found.items()}
            monitor.clear_metrics()
        return load


@contextlib.contextmanager
def harmless() -> Iterator[None]:
    """Say what fails in MLflow, and go on."""
    try:
        yield
    except Exception as problem:  # whatever a store, a network or a disk can raise
        complain(problem)
        print(LACKING, file=sys.stderr)


def reason(problem: Exception) -> str:
    """The first line of what went wrong."""
    text = str(problem).strip()
    return text.splitlines()[0] if text else repr(problem)


def complain(problem: Exception) -> None:
    print(f"MLflow did not take this, going on without it: {reason(problem)}", file=sys.stderr)


def has_store(address: str | None) -> bool:
    """Whether there is one to read: a server is taken at its word, a file must be there."""
    file = _file_of(_address(address))
    return file is None or file.exists()


def _address(address: str | None) -> str:
    return os.environ.get("MLFLOW_TRACKING_URI") or address or "sqlite:///mlflow.db"


def _kept(run: MlflowRun) -> Kept:
    tags = run.data.tags
    return Kept(
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


def _description(run: Run) -> dict[str, str]:
    """What the page shows above a training's figures, once it has ended."""
    if "best_val_loss" not in run.figures:
        return {}
    p, figures = run.record.params, run.figures
    words = (
        f"**Held-out loss {figures['best_val_loss']:.4f}** nats a token, at step"
        f" {figures['best_step']:,.0f} of {figures['steps']:,.0f}; training loss at the end"
        f" {figures['last_train_loss']:.4f}. {p.get('model.n_layer')} layers,"
        f" {p.get('model.n_head')} heads, {p.get('model.n_embd')} wide, context"
        f" {p.get('model.block_size')}, {figures['parameters'] / 1e6:.1f} M parameters, on"
        f" {p.get('data.corpus')}."
    )
    if experiment := run.record.tags.get("dvc_experiment"):
        words += f" `dvc exp apply {experiment}` brings its files back."
    return {"mlflow.note.content": words}


def _status(run: MlflowRun) -> str:
    return "DELETED" if run.info.lifecycle_stage == "deleted" else run.info.status


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


def exclusive() -> filelock.FileLock:
    """One process of the project at a time: SQLite has one writer, and to make a run takes two
    steps, to look for it and to make it. Who has it may take it again."""
    return filelock.FileLock(project_root() / "mlflow.db.lock", timeout=60, is_singleton=True)


def _file_of(address: str) -> Path | None:
    """The file of a SQLite store. A relative one is the project's, wherever a stage runs."""
    scheme, slashes, path = address.partition("sqlite:///")
    return project_root() / path if slashes and not scheme else None


def _artifacts(store: Path) -> str:
    """Where the artifacts of a SQLite store are: beside it."""
    return (store.parent / "mlruns").as_uri()


def _readdress(store: Path, old: str, new: str) -> None:
    """Give every artifact address in a SQLite store that begins with `old` the beginning `new`."""
    with contextlib.closing(sqlite3.connect(store)) as database, database:
        tables = {name for (name,) in database.execute("SELECT name FROM sqlite_master")}
        for table, column in _ADDRESSES:
            if table in tables:
                database.execute(
                    f"UPDATE {table} SET {column} = ? || substr({column}, ?)"
                    f" WHERE substr({column}, 1, ?) = ?",
                    (new, len(old) + 1, len(old), old),
                )


def _make_store(store: Path) -> None:
    """Make a store whole or not at all: killed while its tables are made, it stays broken."""
    for left in store.parent.glob(f"{store.name}.new*"):  # by a kill, perhaps with a journal
        left.unlink()
    new = store.with_name(f"{store.name}.new")
    mlflow.MlflowClient(f"sqlite:///{new}").create_experiment(
        EXPERIMENT, _artifacts(store), view.tags()
    )
    if not store.exists():  # else `mlflow ui` has made one meanwhile
        new.replace(store)
