"""The connection to an MLflow tracking store, and what to do when it fails.

Tracking never stops the work that it tracks.
"""

import contextlib
import logging
import os
import sqlite3
import sys
from collections.abc import Iterator

import filelock
import mlflow
from mlflow.exceptions import MlflowException
from sqlalchemy.exc import SQLAlchemyError

from folio.errors import UserError
from folio.run import project_root
from folio.tracking import local_store, ui

logging.getLogger("mlflow").setLevel(logging.WARNING)  # "creating tables", "starting monitors"

EXPERIMENT = "folio"
STORE_ERRORS = (MlflowException, SQLAlchemyError, sqlite3.Error, OSError)
SYNC = "`python -m folio sync`"
INCOMPLETE = f"MLflow does not have all of this run yet: {SYNC} sends the rest"


class Store:
    """A tracking store with the project's experiment in it.

    Attributes: `uri`, `client` (an MlflowClient) and `experiment_id`. Whatever uses the client may
    raise STORE_ERRORS.
    """

    def __init__(self, uri: str | None, repair: bool = False):
        """Connect, and create the store or the experiment where it does not exist.

        uri: used where MLFLOW_TRACKING_URI is not set; None is mlflow.db at the project's root.
        repair: after the project's folder was moved, update the artifact URIs in a local store.
        Raises UserError where they need that and repair is false.
        """
        self.uri = _resolve(uri)
        self._path = local_store.path_of(self.uri)
        if self._path:
            self.uri = f"sqlite:///{self._path}"
        with exclusive():
            if self._path and not self._path.exists():
                local_store.create(self._path, EXPERIMENT)
            self.client = mlflow.MlflowClient(self.uri)
            self.experiment_id = self._open_experiment(repair)

    @classmethod
    def existing(cls, uri: str | None) -> "Store":
        """Connect to a store that exists. Raises UserError if it does not, or does not answer."""
        if not exists(uri):
            raise UserError(f"there is no MLflow store yet: `dvc repro` creates one, or {SYNC}")
        try:
            return cls(uri)
        except STORE_ERRORS as problem:
            raise UserError(f"MLflow does not answer: {first_line(problem)}") from None

    def _open_experiment(self, repair: bool) -> str:
        """The experiment's id. If `mlflow ui` created the experiment, a client could not upload
        artifacts to it, so it is created here."""
        location = local_store.artifact_location(self._path) if self._path else None
        experiment = self.client.get_experiment_by_name(EXPERIMENT)
        if experiment is None:
            try:
                return self.client.create_experiment(EXPERIMENT, location, ui.tags())
            except MlflowException:  # another client has just created it
                return self.client.get_experiment_by_name(EXPERIMENT).experiment_id
        for key, value in ui.tags().items():
            if key not in experiment.tags or (key == ui.TAG and experiment.tags[key] != value):
                self.client.set_experiment_tag(experiment.experiment_id, key, value)
        if experiment.lifecycle_stage == "deleted":
            restore = f"mlflow experiments restore --experiment-id {experiment.experiment_id}"
            raise UserError(
                f"MLflow's experiment {EXPERIMENT} was deleted: `{restore}` restores it"
            )
        previous = experiment.artifact_location
        if self._path and location and previous != location and previous.endswith("/mlruns"):
            if not repair:
                raise UserError(
                    f"{self._path.name} was created for {previous}, and the project has been moved"
                    f" since: {SYNC} updates its artifact URIs"
                )
            local_store.relocate_artifacts(self._path, previous, location)
        return experiment.experiment_id


def exists(uri: str | None) -> bool:
    """Whether there is a store to read: a file must exist, a server is assumed to."""
    path = local_store.path_of(_resolve(uri))
    return path is None or path.exists()


def exclusive() -> filelock.FileLock:
    """A lock that only one process of the project holds at a time; it is reentrant.

    SQLite has one writer, and creating a run takes two steps: looking for it, then creating it.
    """
    return filelock.FileLock(project_root() / "mlflow.db.lock", timeout=60, is_singleton=True)


@contextlib.contextmanager
def warn_on_failure() -> Iterator[None]:
    """Print what fails in MLflow, and continue after the block."""
    try:
        yield
    except Exception as problem:  # whatever a store, a network or a disk can raise
        warn(problem)
        print(INCOMPLETE, file=sys.stderr)


def warn(problem: Exception) -> None:
    print(f"MLflow failed, continuing without it: {first_line(problem)}", file=sys.stderr)


def first_line(problem: Exception) -> str:
    text = str(problem).strip()
    return text.splitlines()[0] if text else repr(problem)


def _resolve(uri: str | None) -> str:
    return os.environ.get("MLFLOW_TRACKING_URI") or uri or "sqlite:///mlflow.db"
