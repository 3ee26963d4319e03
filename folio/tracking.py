"""MLflow, and the only file that knows it. Tracking never stops the work it tracks."""

import contextlib
import logging
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Self

os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
# A server that is away is given up on after seconds; MLflow's own settings wait for minutes.
os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")
os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "10")

import filelock
import mlflow
from mlflow.data.code_dataset_source import CodeDatasetSource
from mlflow.data.meta_dataset import MetaDataset
from mlflow.entities import Metric, Param
from mlflow.exceptions import MlflowException

logging.getLogger("mlflow").setLevel(logging.WARNING)  # tables made, monitors started

EXPERIMENT = "folio"
_BATCH = 1000  # metrics that one log_batch call may hold


def project_root() -> Path:
    """Where the store and the checkpoints are: DVC's root, even in an experiment's own copy."""
    return Path(os.environ.get("DVC_ROOT") or Path.cwd()).resolve()


class Run:
    """One MLflow run, as a context manager.

    Whatever fails in the store or on the way to it is said once and does no harm: points wait in
    the history and go with the next call that gets through. `id` is None until the run exists.
    """

    def __init__(
        self,
        address: str | None,
        name: str | None = None,
        params: dict[str, Any] | None = None,
        tags: dict[str, str] | None = None,
        parent: str | None = None,
        memo: Path | None = None,
        system_metrics: bool = False,
    ):
        """address: the store's; None takes MLFLOW_TRACKING_URI, or mlflow.db at the project's root.

        memo: a file that remembers the run's id, so that a restart goes on with the same run.
        """
        self.id: str | None = None
        self._address, self._name, self._parent, self._memo = address, name, parent, memo
        self._params, self._tags = params or {}, tags or {}
        self._system_metrics = system_metrics
        self._shipped = 0  # rows of the history that are in the store
        self._complained = False

    def __enter__(self) -> Self:
        with self._unharmed():
            self._start()
        return self

    def __exit__(self, kind: type | None, *_: object) -> None:
        with self._unharmed():
            if self.id:
                stopped = "KILLED" if kind is KeyboardInterrupt else "FAILED"
                mlflow.end_run(stopped if kind else "FINISHED")

    def ship(self, history: list[dict[str, Any]]) -> None:
        """Send the rows that are not in the store yet; each has step, time (ms) and metrics.

        Sending a row twice does no harm: the store drops exact repeats.
        """
        points = [
            Metric(key, value, row["time"], row["step"])
            for row in history[self._shipped :]
            for key, value in row.items()
            if key not in ("step", "time")
        ]
        with self._unharmed():
            client = self._client()
            for i in range(0, len(points), _BATCH):
                client.log_batch(self.id, metrics=points[i : i + _BATCH])
            self._shipped = len(history)

    def metrics(self, values: dict[str, float], step: int = 0) -> None:
        with self._unharmed():
            self._client()
            mlflow.log_metrics(values, step=step, run_id=self.id)

    def artifacts(self, path: Path, folder: str | None = None) -> None:
        """Keep a file, or a folder's files, under `folder` of the run's artifacts."""
        with self._unharmed():
            client = self._client()
            log = client.log_artifacts if path.is_dir() else client.log_artifact
            log(self.id, str(path), folder)

    def dataset(self, name: str, digest: str, made_by: str) -> None:
        """Say what the run is trained on; made_by is the source file that made it."""
        with self._unharmed():
            self._client()
            source = CodeDatasetSource({"mlflow.source.name": made_by})
            mlflow.log_input(MetaDataset(source, name, digest[:32]), context="training")

    def _client(self) -> mlflow.MlflowClient:
        """A client of the store, with the run in it (started now if the store was away before)."""
        if self.id is None:
            self._start()
        return mlflow.MlflowClient()

    def _start(self) -> None:
        experiment = _open_store(self._address)
        known = self._memo.read_text().strip() if self._memo and self._memo.exists() else None
        if known and _has_run(known):
            run = mlflow.start_run(run_id=known, log_system_metrics=self._system_metrics)
        else:
            run = mlflow.start_run(
                experiment_id=experiment,
                run_name=_named(self._name) if not self._parent else self._name,
                parent_run_id=self._parent,
                tags=_dvc_tags() | self._tags,
                log_system_metrics=self._system_metrics,
            )
        self.id = run.info.run_id
        if self._memo:
            self._memo.write_text(self.id)
        params = [Param(key, str(value)) for key, value in self._params.items()]
        self._client().log_batch(self.id, params=params)

    @contextlib.contextmanager
    def _unharmed(self) -> Iterator[None]:
        try:
            yield
        except Exception as problem:  # whatever a store, a network or a disk can raise
            if not self._complained:
                reason = str(problem).strip().splitlines()[0] if str(problem) else repr(problem)
                print(f"MLflow did not take this, going on without it: {reason}", file=sys.stderr)
            self._complained = True


def reopen(address: str | None, run_id: str | None) -> Run | None:
    """A run that is over, to add to; None, with a line, where the store does not have it."""
    run = Run(address)
    with run._unharmed():
        _open_store(address)
        if run_id and _has_run(run_id):
            run.id = run_id
            return run
        print(f"MLflow has no run {run_id} here: its figures are in files only", file=sys.stderr)
    return None


def _open_store(address: str | None) -> str:
    """Point mlflow at the store; returns the experiment's id, made where it is missing.

    The client makes the experiment, under a lock: two processes that make a store at once break
    it, and an experiment that `mlflow ui` makes takes no artifacts from a local client.
    """
    root = project_root()
    local = f"sqlite:///{root / 'mlflow.db'}"
    mlflow.set_tracking_uri(os.environ.get("MLFLOW_TRACKING_URI") or address or local)
    mlflow.set_system_metrics_sampling_interval(5)
    with filelock.FileLock(root / "mlflow.db.lock"):
        experiment = mlflow.get_experiment_by_name(EXPERIMENT)
        if experiment:
            return experiment.experiment_id
        place = (root / "mlruns").as_uri() if mlflow.get_tracking_uri() == local else None
        return mlflow.create_experiment(EXPERIMENT, artifact_location=place)


def _has_run(run_id: str) -> bool:
    try:
        return mlflow.get_run(run_id).info.lifecycle_stage == "active"
    except MlflowException as problem:
        if problem.error_code != "RESOURCE_DOES_NOT_EXIST":
            raise
        return False


def _named(name: str | None) -> str | None:
    """The run's name, behind that of the DVC experiment which it is part of."""
    return " ".join(filter(None, [os.environ.get("DVC_EXP_NAME"), name])) or None


def _dvc_tags() -> dict[str, str]:
    """Which DVC experiment this is, and the commit that it started from."""
    names = {"dvc_experiment": "DVC_EXP_NAME", "dvc_baseline": "DVC_EXP_BASELINE_REV"}
    return {tag: os.environ[name] for tag, name in names.items() if os.environ.get(name)}
