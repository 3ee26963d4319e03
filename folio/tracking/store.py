"""The connection to an MLflow tracking store, and the handling of its failures.

A failure of the store never stops a training or an evaluation.
"""

import contextlib
import logging
import os
import sqlite3
import sys
from collections.abc import Callable, Iterator
from typing import TypeVar

import filelock
import mlflow
from mlflow.exceptions import MlflowException
from mlflow.store.entities import PagedList
from sqlalchemy.exc import SQLAlchemyError

from folio.errors import UserError
from folio.run import project_root
from folio.tracking import local_store, ui

# Hides, for example, "Creating initial MLflow database tables".
logging.getLogger("mlflow").setLevel(logging.WARNING)

T = TypeVar("T")

EXPERIMENT = "folio"
STORE_ERRORS = (MlflowException, SQLAlchemyError, sqlite3.Error, OSError)
SYNC = "`python -m folio sync`"
INCOMPLETE = f"MLflow does not have all of this run yet: {SYNC} sends the rest"


class Store:
    """A tracking store that contains the project's experiment.

    Attributes: `uri`, `client` (an MlflowClient) and `experiment_id`. Every call of the client may
    raise one of STORE_ERRORS.
    """

    def __init__(self, uri: str | None, repair: bool = False):
        """Connect to the store. Create it, or the experiment, if it does not exist.

        uri: used unless MLFLOW_TRACKING_URI is set; None is mlflow.db at the project's root.
        repair: update the artifact URIs in a local store if the project's folder was moved.

        Raises UserError if they need an update and `repair` is false, or if the experiment was
        deleted.
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
        """Connect to an existing store. Raises UserError if there is no store or no answer."""
        if not exists(uri):
            raise UserError(f"there is no MLflow store yet: `dvc repro` or {SYNC} creates one")
        try:
            return cls(uri)
        except STORE_ERRORS as problem:
            raise UserError(f"MLflow does not answer: {first_line(problem)}") from None

    def _open_experiment(self, repair: bool) -> str:
        """Create or open the experiment and return its id.

        It is created here because clients could not upload artifacts to an experiment that was
        created by `mlflow ui`.
        """
        location = local_store.artifact_location(self._path) if self._path else None
        experiment = self.client.get_experiment_by_name(EXPERIMENT)
        if experiment is None:
            try:
                return self.client.create_experiment(EXPERIMENT, location, ui.tags())
            except MlflowException:
                experiment = self.client.get_experiment_by_name(EXPERIMENT)
                if experiment is None:
                    raise
                return experiment.experiment_id  # another client has just created it
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


def all_pages(search: Callable[..., PagedList[T]]) -> Iterator[T]:
    """The results of a search on all of its pages. search: takes `page_token`."""
    page = search(page_token=None)
    yield from page
    while page.token:
        page = search(page_token=page.token)
        yield from page


def exists(uri: str | None) -> bool:
    """Whether there is a store to read. A server is not contacted: it is assumed to exist."""
    path = local_store.path_of(_resolve(uri))
    return path is None or path.exists()


def exclusive() -> filelock.FileLock:
    """A reentrant lock between the processes of the project.

    SQLite allows only one writer, and a run is created in two steps: search, then create.
    """
    return filelock.FileLock(project_root() / "mlflow.db.lock", timeout=60, is_singleton=True)


@contextlib.contextmanager
def warn_on_failure() -> Iterator[None]:
    """Report any failure in the block as a warning, and continue after the block."""
    try:
        yield
    except Exception as problem:  # whatever a store, a network or a disk can raise
        warn(problem)
        print(INCOMPLETE, file=sys.stderr)


def warn(problem: Exception) -> None:
    """Print a failure of MLflow in one line on stderr."""
    print(f"MLflow failed, continuing without it: {first_line(problem)}", file=sys.stderr)


def first_line(problem: Exception) -> str:
    """The first line of an exception's message."""
    text = str(problem).strip()
    return text.splitlines()[0] if text else repr(problem)


def _resolve(uri: str | None) -> str:
    return os.environ.get("MLFLOW_TRACKING_URI") or uri or "sqlite:///mlflow.db"
