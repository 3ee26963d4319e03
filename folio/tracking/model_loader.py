"""Opening a model by its name: a folder, or a model in MLflow."""

import tempfile
from pathlib import Path

import torch

from folio.errors import UserError
from folio.gpt import huggingface
from folio.gpt.model import GPT


def load_model(name: str, uri: str | None, device: torch.device) -> GPT:
    """The model in the folder called `name` or, where there is no such folder, in the MLflow store
    at `uri`, named as registry.fetch takes it. Raises UserError."""
    if Path(name).is_dir() or name == "models/gpt2":
        return huggingface.load(Path(name), device)
    if "/" in name and not name.startswith("models:/"):
        raise UserError(f"there is no folder {name}")
    from folio.tracking import registry  # importing MLflow takes two seconds
    from folio.tracking.store import Store

    with tempfile.TemporaryDirectory(prefix="folio-") as folder:
        path = registry.fetch(Store.existing(uri), name, Path(folder))
        return huggingface.load(path, device)
