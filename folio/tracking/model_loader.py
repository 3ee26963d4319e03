"""Loading a model by its name: a folder, or a model in MLflow."""

import tempfile
from pathlib import Path

import torch

from folio.errors import UserError
from folio.gpt import huggingface
from folio.gpt.model import GPT


def load_model(name: str, uri: str | None, device: torch.device) -> GPT:
    """Load the model from the folder `name` or, if there is no such folder, from MLflow.

    name: a Hugging Face GPT-2 folder, or a name for `registry.fetch`. uri: of the MLflow store. The
    model is in eval mode on `device`. Raises UserError if there is no such model.
    """
    if Path(name).is_dir() or name == "models/gpt2":  # the default, even if it does not exist yet
        return huggingface.load(Path(name), device)
    if "/" in name and not name.startswith("models:/"):
        raise UserError(f"there is no folder {name}")
    from folio.tracking import registry  # here, because importing MLflow takes two seconds
    from folio.tracking.store import Store

    with tempfile.TemporaryDirectory(prefix="folio-") as folder:
        path = registry.fetch(Store.existing(uri), name, Path(folder))
        return huggingface.load(path, device)
