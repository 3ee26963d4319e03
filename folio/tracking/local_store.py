"""The SQLite store at the project's root: atomic creation, and repair after the project moved."""

import contextlib
import sqlite3
from pathlib import Path

from mlflow import MlflowClient

from folio.run import project_root
from folio.tracking import ui

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
    scheme, slashes, path = uri.partition("sqlite:///")
    return project_root() / path if slashes and not scheme else None


def artifact_location(path: Path) -> str:
    """The URI of the artifact folder, which is beside the SQLite store."""
    return (path.parent / "mlruns").as_uri()


def create(path: Path, experiment: str) -> None:
    """Create a store that contains the experiment, atomically.

    If a process were killed while MLflow creates the tables, the store would stay broken.
    """
    # A killed process may have left an incomplete store and its journal.
    for leftover in path.parent.glob(f"{path.name}.new*"):
        leftover.unlink()
    new = path.with_name(f"{path.name}.new")
    client = MlflowClient(f"sqlite:///{new}")
    client.create_experiment(experiment, artifact_location(path), ui.tags())
    if not path.exists():  # otherwise `mlflow ui` has just created one
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
