"""The connection to an MLflow tracking store, and the handling of its failures.

A failure of the store never stops training or evaluation.
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
from mlflow.store.db import utils as db_utils
from mlflow.store.entities import PagedList
from sqlalchemy.exc import SQLAlchemyError

from folio.errors import UserError
from folio.run import project_root
from folio.tracking import failures, local_store, ui
from folio.tracking.failures import SYNC
from folio.tracking.logger import INCOMPLETE

# Hides, for example, "Creating initial MLflow database tables".
logging.getLogger("mlflow").setLevel(logging.WARNING)
# By default, MLflow tries for two minutes to connect to a database. It logs each attempt and, with
# a traceback, each error, which it raises as well.
db_utils.MAX_RETRY_COUNT = 2
logging.getLogger("mlflow.store.db.utils").setLevel(logging.CRITICAL)

T = TypeVar("T")

_latest = ""  # the URI of the store that was opened last
EXPERIMENT = "folio"
# ImportError: a database or an artifact store needs a package that is not installed.
STORE_ERRORS = (MlflowException, SQLAlchemyError, sqlite3.Error, OSError, ImportError)


class Store:
    """A tracking store that contains the project's experiment.

    Attributes: `uri`, `client` (an MlflowClient), `experiment_id`, and `path`, which is the file of
    a SQLite store and None for any other. Any call to the client may raise one of STORE_ERRORS.
    """

    def __init__(self, uri: str | None, repair: bool = False):
        """Connect to the store. Creates the store and the experiment if they do not exist.

        uri: used unless MLFLOW_TRACKING_URI is set; None means mlflow.db in the project's root.
        repair: update the artifact URIs in a local store if the project's folder was moved.

        Raises UserError if MLflow cannot open such a store, if the URIs need an update and `repair`
        is false, or if the experiment was deleted.
        """
        global _latest
        self.uri = _latest = resolve(uri)
        failures.check_uri(self.uri)
        self.path = local_store.path_of(self.uri)
        if self.path:
            self.uri = local_store.absolute_uri(self.uri)
        with self.exclusive():
            if self.path and (not self.path.exists() or local_store.is_empty(self.path)):
                local_store.create(self.path, EXPERIMENT)
            self.client = _connect(self.uri)
            self.experiment_id = self._open_experiment(repair)

    @classmethod
    def existing(cls, uri: str | None) -> "Store":
        """Connect to an existing store. Raises UserError if it does not exist or respond."""
        if not exists(uri):
            raise UserError(f"there is no MLflow store yet: `dvc repro` or {SYNC} creates one")
        path = local_store.path_of(resolve(uri))
        if path and local_store.is_empty(path):
            raise UserError(f"{path} is empty: {SYNC} fills it with the runs in DVC's cache")
        try:
            return cls(uri)
        except STORE_ERRORS as problem:
            raise UserError(f"MLflow failed: {explain(problem)}") from None

    def exclusive(self) -> filelock.FileLock:
        """A reentrant lock shared by the processes that use this store on this machine.

        SQLite allows only one writer, and a run is created in two steps: search, then create. A
        local store is locked for all projects that use it, but a server only for this project.
        """
        path = self.path or project_root() / "mlflow.db"
        return filelock.FileLock(f"{path}.lock", timeout=60, is_singleton=True)

    def _open_experiment(self, repair: bool) -> str:
        """Create or open the experiment and return its id.

        It is created here because clients cannot upload artifacts to an experiment that `mlflow ui`
        has created.
        """
        location = local_store.artifact_location(self.path) if self.path else None
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
        if self.path and location and previous != location and previous.endswith("/mlruns"):
            if not repair:
                raise UserError(
                    f"{self.path.name} was created for {previous}, and the project has been moved"
                    f" since: {SYNC} updates its artifact URIs"
                )
            local_store.relocate_artifacts(self.path, previous, location)
        return experiment.experiment_id


def _connect(uri: str) -> mlflow.MlflowClient:
    try:
        return mlflow.MlflowClient(uri)
    except MlflowException as problem:
        if "unsupported URI" in str(problem):
            raise UserError(failures.explain(problem, uri)) from None
        raise


def reconnect(action: Callable[[], T]) -> T:
    """Call a function that may be called twice; again if a server closed the connection.

    A server closes connections that have been idle for a few seconds, and may do so just when a
    request is sent.
    """
    try:
        return action()
    except STORE_ERRORS as problem:
        if not failures.is_disconnected(problem):
            raise
    return action()


def all_pages(search: Callable[..., PagedList[T]]) -> Iterator[T]:
    """The results on all pages of a search. search: a function that takes `page_token`."""
    page = search(page_token=None)
    yield from page
    while page.token:
        page = search(page_token=page.token)
        yield from page


def exists(uri: str | None) -> bool:
    """Whether there is a store to read. A server is not contacted: it is assumed to exist."""
    path = local_store.path_of(resolve(uri))
    return path is None or path.exists()


@contextlib.contextmanager
def warn_on_failure() -> Iterator[None]:
    """Report any failure in the block as a warning, then continue after the block."""
    try:
        yield
    except Exception as problem:  # whatever a store, a network or a disk can raise
        warn(problem)
        print(INCOMPLETE, file=sys.stderr)


def warn(problem: Exception) -> None:
    """Print a failure of MLflow as one line on stderr."""
    print(f"MLflow failed, continuing without it: {explain(problem)}", file=sys.stderr)


def explain(problem: Exception) -> str:
    """A failure of the most recently opened store, in one line, with a hint if possible."""
    return failures.explain(problem, _latest or resolve(None))


def resolve(uri: str | None) -> str:
    return os.environ.get("MLFLOW_TRACKING_URI") or uri or "sqlite:///mlflow.db"
