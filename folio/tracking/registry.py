"""Access to models in MLflow by name: models of runs, and registered models.

Registered models are versions of `folio`; the alias `champion` marks the best one.
"""

import contextlib
import os
import re
import tempfile
from collections.abc import Iterator
from pathlib import Path

import mlflow
from mlflow.exceptions import MlflowException

from folio.errors import UserError
from folio.tracking import logged_models
from folio.tracking.failures import first_line
from folio.tracking.logged_models import ARTIFACT, logged_model_id
from folio.tracking.queries import TrackedRun, find_run, list_runs, tracked_run
from folio.tracking.store import SYNC, Store

NAME, CHAMPION = "folio", "champion"


def available_models(store: Store) -> list[tuple[str, str]]:
    """The (label, name) of every model that `fetch` can open: the champion, then one per run."""
    best, version = champion(store)
    label = f"champion (version {version}, validation loss {best.loss:.3f})" if best else ""
    first = [(label, f"models:/{NAME}@{CHAMPION}")] if best else []
    ready = logged_models.ready_run_ids(store)
    runs = [run for run in list_runs(store) if run.id in ready]
    return first + [(f"{run.name}, validation loss {run.loss:.3f}", run.id) for run in runs]


def fetch(store: Store, name: str, folder: Path) -> Path:
    """Download a model into `folder`, and return the path of its Hugging Face folder.

    name: models:/NAME@ALIAS, models:/NAME/VERSION, or a name that `find_run` accepts. Raises
    UserError if there is no such model, or if its files are missing or damaged.
    """
    model = store.client.get_logged_model(_model_id(store, name))
    uri = f"{model.artifact_location}/artifacts/{ARTIFACT}"
    destination = {"dst_path": str(folder), "tracking_uri": store.client.tracking_uri}
    try:
        path = Path(mlflow.artifacts.download_artifacts(uri, **destination))
    except Exception as problem:  # whatever the client of an artifact store can raise
        if not logged_models.is_complete(store, model):
            raise _damaged(name) from None
        reason = first_line(problem)
        raise UserError(f"MLflow cannot provide the model {name}: {reason}") from None
    if not logged_models.is_intact(path, model):
        logged_models.mark_as_damaged(store, model)
        raise _damaged(name)
    return path


def verify(store: Store, name: str) -> None:
    """Download a model and check that it can be served. name: as for `fetch`.

    Raises UserError if there is no such model, or if its files are missing or damaged.
    """
    with tempfile.TemporaryDirectory(prefix="folio-") as folder:
        fetch(store, name, Path(folder))
    if not logged_models.is_complete(store, store.client.get_logged_model(_model_id(store, name))):
        raise _damaged(name)


def _damaged(name: str) -> UserError:
    return UserError(
        f"files of the model {name} are missing or damaged in MLflow: {SYNC} sends them again if"
        " they are in DVC's cache"
    )


def source_run_id(store: Store, name: str) -> str:
    """The id of the training run that produced a model. name: as for `fetch`.

    Raises UserError if there is no such model.
    """
    if not name.startswith("models:/"):
        return find_run(store, name).id
    run_id = store.client.get_logged_model(registered_model_id(store, name)).source_run_id
    if not run_id:
        raise UserError(f"{name} was not registered by Folio: it does not belong to a run")
    return run_id


def _model_id(store: Store, name: str) -> str:
    """The id of the logged model that a name refers to."""
    if name.startswith("models:/"):
        return registered_model_id(store, name)
    return logged_model_id(store, find_run(store, name))


def registered_model_id(store: Store, name: str) -> str:
    """The id of the logged model that models:/NAME@ALIAS or models:/NAME/VERSION refers to.

    Raises UserError if the name is invalid or there is no such model.
    """
    parts = re.fullmatch(r"models:/([^/@]+)(?:@([^/@]+)|/(\d+))", name)
    if not parts:
        raise UserError(
            f"{name} is not a model URI: use, for example, models:/{NAME}@{CHAMPION} or"
            f" models:/{NAME}/1"
        )
    model, alias, version = parts.groups()
    try:
        found = (
            store.client.get_model_version_by_alias(model, alias)
            if alias
            else store.client.get_model_version(model, version)
        )
    except MlflowException as problem:
        if not _is_not_found(problem):
            raise
        raise UserError(
            f"{name} is not registered: `python -m folio promote` registers a model"
        ) from None
    source = found.source or ""
    if not source.startswith("models:/"):
        raise UserError(f"{name} was not registered by Folio: its source is {source}")
    return source.removeprefix("models:/")  # some stores do not return the version's model_id


def register(store: Store, run: TrackedRun) -> str:
    """Register a run's model, unless it is already registered. Returns its version number.

    Raises UserError if the run has no model.
    """
    with store.exclusive():
        client, model_id = store.client, logged_model_id(store, run)
        try:
            client.create_registered_model(NAME, description="GPT-2 models trained by Folio.")
        except MlflowException as problem:
            if problem.error_code != "RESOURCE_ALREADY_EXISTS":
                raise
            query = f"name = '{NAME}' and run_id = '{run.id}'"
            for version in client.search_model_versions(query):
                if version.source == f"models:/{model_id}":
                    return str(version.version)
        description = f"{run.name}: validation loss {run.loss:.4f} nats/token"
        with _default_store(client.tracking_uri):
            version = client.create_model_version(
                NAME, f"models:/{model_id}", run.id, description=description, model_id=model_id
            )
        return str(version.version)


def champion(store: Store) -> tuple[TrackedRun | None, str]:
    """The champion's training run and version number.

    The run is None if it no longer exists. Without a champion, returns (None, "").
    """
    try:
        version = store.client.get_model_version_by_alias(NAME, CHAMPION)
    except MlflowException as problem:
        if not _is_not_found(problem):
            raise
        return None, ""
    try:
        return tracked_run(store.client.get_run(version.run_id or "")), str(version.version)
    except MlflowException as problem:
        if not _is_not_found(problem):
            raise
        return None, str(version.version)


def set_champion(store: Store, version: str) -> None:
    """Move the alias `champion` to a version of the registered model."""
    store.client.set_registered_model_alias(NAME, CHAMPION, version)


def _is_not_found(problem: MlflowException) -> bool:
    """Whether the store reports that something does not exist, rather than another failure."""
    return problem.error_code in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE")


@contextlib.contextmanager
def _default_store(uri: str) -> Iterator[None]:
    """Make `uri` this process's default store within the block.

    A registry in SQLite looks up logged models in the default store, not in the store of its client
    (MLflow 3.17, SqlAlchemyStore).
    """
    previous = os.environ.get("MLFLOW_TRACKING_URI")
    mlflow.set_tracking_uri(uri)
    try:
        yield
    finally:
        mlflow.set_tracking_uri(None)  # type: ignore[arg-type]  # removes the setting
        if previous:
            os.environ["MLFLOW_TRACKING_URI"] = previous
