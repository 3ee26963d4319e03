"""The models that the page can open: the pipeline's, any other folder, and those in MLflow."""

import contextlib
import dataclasses
import functools
import os
import threading
from pathlib import Path
from typing import Any

import torch

from folio import device, files, params
from folio.errors import UserError
from folio.gpt import huggingface
from folio.gpt.model import GPT
from folio.run import HISTORY, RECORD, TRAINING, read_history, read_record
from folio.runtime import RuntimeParams
from folio.tracking.model_loader import load_model

PIPELINE = "models/gpt2"
IN_SPACE = "SPACE_ID" in os.environ  # on Hugging Face, where anyone may visit the page


@dataclasses.dataclass(frozen=True)
class OpenModel:
    name: str  # as the visitor gave it
    model: GPT
    history: list[dict[str, Any]]  # of its training; empty if that is not known


def open_model(name: str, refresh: bool = False) -> OpenModel:
    """The model in the folder `name` or, if there is no such folder, in MLflow.

    refresh: query MLflow again, where an alias may have moved. A folder that has changed is always
    read again. Raises UserError.
    """
    name = (name or "").strip()
    if not name:
        raise UserError("no model is selected: choose one, or type the path of a folder")
    if IN_SPACE and name != PIPELINE:
        raise UserError(f"this page only has the model {PIPELINE}")
    folder = _folder(name)
    with _lock:
        if refresh and folder is None:
            _open.cache_clear()
        return _open(name, folder, _modified(folder))


def available() -> list[tuple[str, str]]:
    """(label, name) of the models to choose from: the pipeline's first, then those in MLflow."""
    found = [(PIPELINE, PIPELINE)]
    with contextlib.suppress(UserError):  # there is no store, or it was moved
        (runtime,) = params.load(runtime=RuntimeParams)
        from folio.tracking import registry  # importing MLflow takes two seconds
        from folio.tracking.store import STORE_ERRORS, Store

        with contextlib.suppress(*STORE_ERRORS):
            found += registry.available_models(Store.existing(runtime.tracking_uri))
    return found


_lock = threading.Lock()  # several visitors may open the same model: it is read once


@functools.lru_cache(maxsize=2)
def _open(name: str, folder: Path | None, modified: tuple[int, ...]) -> OpenModel:
    """modified: makes a retrained model another entry of the cache."""
    where = device.resolve_device("auto")
    if folder is None:
        return OpenModel(name, *_from_mlflow(name, where))
    return OpenModel(name, huggingface.load(folder, where), _history(folder))


def _folder(name: str) -> Path | None:
    """The folder that a name refers to; None if MLflow has to look the name up."""
    try:
        folder = Path(name).expanduser()
        is_path = name == PIPELINE or folder.is_dir() or os.sep in name
        return folder if is_path and not name.startswith("models:/") else None
    except (OSError, RuntimeError, ValueError):  # too long, an unknown ~user, a NUL character
        raise UserError(f"{name[:100]!r} is not a valid path: type the path of a folder") from None


def _modified(folder: Path | None) -> tuple[int, ...]:
    """When the files of a model were last written."""
    names = ("model.safetensors", "config.json") if folder else ()
    try:
        return tuple((folder / name).stat().st_mtime_ns for name in names if folder)
    except OSError:
        return ()  # huggingface.load reports what is wrong


def _history(folder: Path) -> list[dict[str, Any]]:
    """The history of the training that produced a folder's weights, if it is stored beside it."""
    training = folder.parent / TRAINING.name
    try:
        record = read_record(training / RECORD)
        if record.tags.get("weights_sha256") == files.sha256(folder / "model.safetensors"):
            return read_history(training / HISTORY)
    except UserError:
        pass
    return []


def _from_mlflow(name: str, where: torch.device) -> tuple[GPT, list[dict[str, Any]]]:
    """A model, and the losses of its training."""
    (runtime,) = params.load(runtime=RuntimeParams)
    from folio.tracking import queries, registry
    from folio.tracking.store import STORE_ERRORS, Store, first_line

    try:
        model = load_model(name, runtime.tracking_uri, where)
        store = Store.existing(runtime.tracking_uri)
        return model, queries.loss_history(store, registry.source_run_id(store, name))
    except UserError as problem:
        is_uri = name.startswith("models:/")
        text = str(problem) if is_uri else f"there is no folder {name}; {problem}"
        raise UserError(text) from None
    except STORE_ERRORS as problem:
        raise UserError(f"MLflow cannot provide {name}: {first_line(problem)}") from None
