"""Loads a model by name: from a folder or from MLflow."""

import tempfile
import time
from pathlib import Path

import torch

from folio.errors import UserError
from folio.gpt import huggingface
from folio.gpt.model import GPT
from folio.gpt.model_files import MissingModelError
from folio.run import MODEL, RECORD, TRAINING, is_training, project_root, read_record
from folio.tracking.dvc_cache import outs_in_workspace

_SAVING = 2.0  # seconds to wait for the record of a model that has just been saved


def load_model(name: str, uri: str | None, device: torch.device) -> GPT:
    """Load the model from the folder `name` or, if there is no such folder, from MLflow.

    name: a Hugging Face GPT-2 folder, or a name that `registry.fetch` accepts. uri: the URI of the
    MLflow store. The model is in eval mode on `device`. Raises UserError if there is no such model.
    """
    if is_folder(name):
        return load_folder(Path(name), device)
    from folio.tracking import registry  # here, because importing MLflow takes two seconds
    from folio.tracking.store import Store

    with tempfile.TemporaryDirectory(prefix="folio-") as folder:
        path = registry.fetch(Store.existing(uri), name, Path(folder))
        return huggingface.load(path, device)


def is_folder(name: str) -> bool:
    """Whether the name of a model means a folder rather than a model in MLflow.

    Raises UserError if it is the path of a folder that does not exist.
    """
    if Path(name).is_dir() or Path(name) == MODEL:  # the default, even if it does not exist yet
        return True
    if "/" in name and not name.startswith("models:/"):
        raise UserError(f"there is no folder {name}")
    return False


def load_folder(folder: Path, device: torch.device) -> GPT:
    """Load the model from a Hugging Face folder.

    If it is a project's models/gpt2, its weights are compared with the record of their training.
    Raises UserError if there is no such model, or if it is damaged.
    """
    try:
        model = huggingface.load(folder, device)
    except MissingModelError:
        if folder.absolute() == MODEL.absolute():
            raise UserError(f"there is no model in {folder}: {_why_missing()}") from None
        raise
    deadline = time.monotonic() + _SAVING
    while not _is_as_recorded(folder):
        if time.monotonic() > deadline:
            raise UserError(
                f"{folder} is damaged, or is not the model that {TRAINING} describes: `dvc checkout"
                " --force` restores it from an intact cache, `dvc repro --force train` trains it"
                " again"
            )
        time.sleep(0.1)
    return model


def _why_missing() -> str:
    """Why the project has no models/gpt2, or how to get it."""
    if is_training(project_root()):
        return "it is being trained, and there is none until training ends; wait for that"
    if MODEL.as_posix() in outs_in_workspace(Path()):
        return "`dvc checkout` restores the previous one, unless `dvc repro` is running"
    return "`dvc repro` trains one"


def _is_as_recorded(folder: Path) -> bool:
    """Whether the weights in a folder are those in the training record next to it, if any."""
    try:
        record = read_record(folder.parent / TRAINING.name / RECORD)
        digest = record.tags["weights_sha256"]
        return folder.name != MODEL.name or huggingface.weights_sha256(folder) == digest
    except (UserError, KeyError, OSError):  # nothing is known about the model's training
        return True
