"""The SQLite store at the project's root: created whole, and repaired after the project moved."""

import contextlib
import sqlite3
from pathlib import Path

import mlflow

from folio.run import project_root
from folio.tracking import ui

# Where a local store keeps the URIs of artifacts: (table, column).
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
    """The URI of the folder beside a SQLite store that holds its artifacts."""
    return (path.parent / "mlruns").as_uri()


def create(path: Path, experiment: str) -> None:
    """Create a store with an experiment in it, whole or not at all.

    A process killed while MLflow creates the tables would leave a store that stays broken.
    """
    for leftover in path.parent.glob(f"{path.name}.new*"):  # of a kill, perhaps with a journal
        leftover.unlink()
    new = path.with_name(f"{path.name}.new")
    client = mlflow.MlflowClient(f"sqlite:///{new}")
    client.create_experiment(experiment, artifact_location(path), ui.tags())
    if not path.exists():  # else `mlflow ui` has created one in the meantime
        new.replace(path)


def relocate_artifacts(path: Path, old: str, new: str) -> None:
    """Replace the prefix `old` of every artifact URI in a SQLite store by `new`."""
    with contextlib.closing(sqlite3.connect(path)) as database, database:
        tables = {name for (name,) in database.execute("SELECT name FROM sqlite_master")}
        for table, column in _ARTIFACT_URIS:
            if table in tables:
                database.execute(
                    f"UPDATE {table} SET {column} = ? || substr({column}, ?)"
                    f" WHERE substr({column}, 1, ?) = ?",
                    (new, len(old) + 1, len(old), old),
                )
