"""The SQLite store in the project's root: atomic creation, repair if the project was moved, and
permanent deletion, for which MLflow has a command (`mlflow gc`) but no method of its client."""

import contextlib
import glob
import sqlite3
import time
from pathlib import Path
from urllib.parse import quote

from mlflow import MlflowClient
from mlflow.entities import LoggedModel
from sqlalchemy import make_url
from sqlalchemy.exc import ArgumentError

from folio.run import project_root
from folio.tracking import ui

_JUST_CREATED = 5.0  # seconds

# The columns of a local store that contain artifact URIs: (table, column).
_ARTIFACT_URIS = (
    ("experiments", "artifact_location"),
    ("runs", "artifact_uri"),
    ("logged_models", "artifact_location"),
    ("model_versions", "source"),
    ("model_versions", "storage_location"),
)


def path_of(uri: str) -> Path | None:
    """The file of a SQLite URI, or None for any other store.

    A relative path is relative to the project's root, wherever a stage runs.
    """
    try:
        url = make_url(uri)
    except (ArgumentError, ValueError):
        return None
    name = url.database or ""
    is_file = uri.startswith("sqlite:///") and name and name != ":memory:"
    return project_root() / name if is_file and not name.startswith("file:") else None


def is_empty(path: Path) -> bool:
    """Whether a file is empty, as after a power failure. One that has just been created does not
    count: another process may be about to write to it."""
    try:
        status = path.stat()
    except FileNotFoundError:
        return False
    return status.st_size == 0 and time.time() - status.st_mtime > _JUST_CREATED


def absolute_uri(uri: str) -> str:
    """The SQLite URI with an absolute path, which works in any current folder."""
    return f"sqlite:///{project_root() / uri.removeprefix('sqlite:///')}"


def artifact_location(path: Path) -> str:
    """The URI of the artifact folder, which is next to the SQLite store."""
    return (path.parent / "mlruns").as_uri()


def create(path: Path, experiment: str) -> None:
    """Create a store that contains the experiment, atomically.

    If the process were killed while MLflow is creating the tables, the store would remain broken.
    """
    # A killed process may have left an incomplete store and its journal.
    for leftover in path.parent.glob(f"{glob.escape(path.name)}.new*"):
        leftover.unlink()
    new = path.with_name(f"{path.name}.new")
    client = MlflowClient(f"sqlite:///{new.parent}/{quote(new.name)}")
    client.create_experiment(experiment, artifact_location(path), ui.tags())
    if not path.exists() or is_empty(path):  # otherwise `mlflow ui` has just created one
        new.replace(path)


def relocate_artifacts(path: Path, old: str, new: str) -> None:
    """Replace the prefix `old` of all artifact URIs in a SQLite store with `new`."""
    with contextlib.closing(sqlite3.connect(path)) as database, database:
        tables = {name for (name,) in database.execute("SELECT name FROM sqlite_master")}
        for table, column in _ARTIFACT_URIS:
            if table in tables:
                database.execute(
                    f"UPDATE {table} SET {column} = ? || substr({column}, ?)"
                    f" WHERE substr({column}, 1, ?) = ?",
                    (new, len(old) + 1, len(old), old),
                )


def ids(path: Path) -> set[str]:
    """The ids of all runs and logged models in a SQLite file, including deleted ones. Raises
    sqlite3.Error if it cannot be read."""
    found: set[str] = set()
    with contextlib.closing(sqlite3.connect(f"{path.as_uri()}?mode=ro", uri=True)) as database:
        tables = {name for (name,) in database.execute("SELECT name FROM sqlite_master")}
        for table, column in (("runs", "run_uuid"), ("logged_models", "model_id")):
            if table in tables:
                found |= {id for (id,) in database.execute(f"SELECT {column} FROM {table}")}
    return found


def deleted_models(client: MlflowClient, experiment_id: str) -> list[LoggedModel]:
    """The logged models of an experiment that are in the trash."""
    store = client._tracking_client.store
    ids = store._get_deleted_logged_models()
    models = [store.get_logged_model(id, allow_deleted=True) for id in ids]
    return [model for model in models if model.experiment_id == experiment_id]


def delete_run(client: MlflowClient, run_id: str) -> None:
    """Delete a run permanently, without its artifacts."""
    client._tracking_client.store._hard_delete_run(run_id)


def delete_model(client: MlflowClient, model_id: str) -> None:
    """Delete a logged model permanently, without its artifacts."""
    client._tracking_client.store._hard_delete_logged_model(model_id)
