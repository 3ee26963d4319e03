"""The models that the page can open: the pipeline's, any other folder, and models in MLflow."""

import contextlib
import dataclasses
import functools
import os
import threading
from pathlib import Path
from typing import Any

import torch

from folio import device, params
from folio.errors import UserError
from folio.gpt import huggingface
from folio.gpt.model import GPT
from folio.inference.precision import in_precision
from folio.run import HISTORY, RECORD, TRAINING, read_history, read_record
from folio.runtime import RuntimeParams
from folio.tracking.model_loader import load_folder, load_model

PIPELINE = "models/gpt2"
IN_SPACE = "SPACE_ID" in os.environ  # on Hugging Face, where anyone may visit the page


@dataclasses.dataclass(frozen=True)
class OpenModel:
    name: str  # the folder, the name of the MLflow run, or models:/...
    model: GPT
    history: list[dict[str, Any]]  # of its training; empty if unknown

    @functools.cached_property
    def generating(self) -> GPT:
        """The model to generate text with: on a GPU a copy in bf16, otherwise `model` itself.

        The probabilities of tokens are those of `model`, in fp32.
        """
        return in_precision(self.model, "auto")


def open_model(name: str, refresh: bool = False) -> OpenModel:
    """The model in the folder `name` or, if there is no such folder, in MLflow.

    refresh: query MLflow again, because an alias may have moved. A folder that has changed is
    always read again. Raises UserError if the model cannot be opened.
    """
    name = (name or "").strip()
    if not name:
        raise UserError("no model is selected: choose one, or type the path of a folder")
    if IN_SPACE and name != PIPELINE:
        raise UserError(f"only the model {PIPELINE} is available on this page")
    folder = _folder(name)
    with _lock:
        if refresh and folder is None:
            _open.cache_clear()
        for _ in range(3):
            modified = _modified(folder)
            opened = _open(name, folder, modified)
            if modified == _modified(folder):  # else the history may be that of a newer model
                break
        return opened


def available() -> list[tuple[str, str]]:
    """The (label, name) of each model to choose from: the pipeline's, then those in MLflow."""
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
    """Open a model. modified: part of the cache key, so that a retrained model is read again."""
    where = device.resolve_device("auto")
    if folder is None:
        return _from_mlflow(name, where)
    return OpenModel(name, load_folder(folder, where), _history(folder))


def _folder(name: str) -> Path | None:
    """The folder that a name refers to, or None if the name has to be looked up in MLflow."""
    try:
        folder = Path(name).expanduser()
        is_path = name == PIPELINE or folder.is_dir() or os.sep in name
        return folder if is_path and not name.startswith("models:/") else None
    except (OSError, RuntimeError, ValueError):  # too long, an unknown ~user, a NUL character
        raise UserError(f"{name[:100]!r} is not a valid path: type the path of a folder") from None


def _modified(folder: Path | None) -> tuple[int, ...]:
    """Identifies a model's files: a different result means that the model has been replaced."""
    patterns = ("*.safetensors", "*.json") if folder else ()
    try:
        found = (path.stat() for each in patterns for path in sorted(Path(folder or "").glob(each)))
        return tuple(n for s in found for n in (s.st_ino, s.st_size, s.st_mtime_ns))
    except OSError:
        return ()  # huggingface.load reports what is wrong


def _history(folder: Path) -> list[dict[str, Any]]:
    """The history of the run that trained the model in a folder, if it is stored next to it."""
    training = folder.parent / TRAINING.name
    try:
        record = read_record(training / RECORD)
        if record.tags.get("weights_sha256") == huggingface.weights_sha256(folder):
            return read_history(training / HISTORY)
    except UserError:
        pass
    return []


def _from_mlflow(name: str, where: torch.device) -> OpenModel:
    """A model with the losses from its training."""
    (runtime,) = params.load(runtime=RuntimeParams)
    from folio.tracking import queries, registry
    from folio.tracking.store import STORE_ERRORS, Store, explain

    try:
        model = load_model(name, runtime.tracking_uri, where)
        store = Store.existing(runtime.tracking_uri)
        run_id = registry.source_run_id(store, name)
        run_name = store.client.get_run(run_id).info.run_name
        shown = name if name.startswith("models:/") else run_name
        return OpenModel(shown, model, queries.loss_history(store, run_id))
    except UserError as problem:
        is_uri = name.startswith("models:/")
        text = str(problem) if is_uri else f"there is no folder {name}; {problem}"
        raise UserError(text) from None
    except STORE_ERRORS as problem:
        raise UserError(f"cannot get {name} from MLflow: {explain(problem)}") from None
