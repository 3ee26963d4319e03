"""`python -m folio export`: a folder with everything needed to publish a model."""

import json
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from folio import files
from folio.cli.store import tracking_uri
from folio.cli.training_texts import GAP
from folio.errors import UserError, disk_hint

if TYPE_CHECKING:
    from folio.gpt.model import GPT
    from folio.tracking.origin import Origin

_MODEL_HELP = "A model folder, the name or id of an MLflow run, or models:/folio@champion."
_MAX_VOCABULARY = 1 << 26  # bytes


def export(
    directory: Annotated[Path, typer.Argument(help="A new folder, or an empty one.")],
    model: Annotated[str, typer.Option(help=_MODEL_HELP)] = "models/gpt2",
) -> None:
    """Write a model to a folder for publication, with a model card.

    The card (README.md) has the results and params of the training run; what only you can add to it
    is marked FILL IN. NOTICE has the license of GPT-2's vocabulary.

    Example: python -m folio export ../my-model --model models:/folio@champion
    """
    target = _check_target(directory)
    gpt, origin = _load(model)
    text = export_model(gpt, origin, target)
    size = sum(path.stat().st_size for path in target.iterdir()) / 1e6
    print(f"{directory}: the model with its card and notices, {size:,.1f} MB")
    if gaps := text.count(GAP):
        places = "1 place" if gaps == 1 else f"{gaps} places"
        print(f"Before you publish it, complete README.md: {places} marked {GAP}")
    print("docs/share.md shows how to publish and convert it")


def export_model(gpt: "GPT", origin: "Origin | None", target: Path) -> str:
    """Write a model with its card and notices to the folder `target`. Returns the card.

    The folder is written under a temporary name and then renamed. Raises UserError if this fails,
    and leaves no part of it behind.
    """
    from folio.cli import model_card, notices
    from folio.gpt import huggingface, weight_files

    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(
            prefix=f".{target.name[:50]}.", dir=target.parent
        ) as parent:
            folder = Path(parent) / target.name
            huggingface.save(gpt, folder)
            digest = huggingface.weights_sha256(folder)
            sharded = (folder / weight_files.INDEX).exists()
            text = model_card.write(gpt, origin, target.name, digest, sharded)
            files.write_text(folder / "README.md", text)
            files.write_text(folder / "NOTICE", notices.VOCABULARY)
            folder.rename(target)  # an empty folder is replaced
    except OSError as error:
        reason = disk_hint(error) or f"{target} cannot be written: {error.strerror or error}"
        raise UserError(reason) from None
    return text


def _check_target(directory: Path) -> Path:
    """The real path of a folder that does not exist or is empty. Raises UserError for any other."""
    try:
        target, root = directory.resolve(), Path.cwd().resolve()
        if any(target.is_relative_to(root / name) for name in ("data", "models", ".dvc")):
            raise UserError(f"{directory} is in a folder of the pipeline: choose one outside it")
        if directory.is_symlink() and not target.exists():
            raise UserError(f"{directory} is a link to {target}, which does not exist")
        if target.is_dir() and any(target.iterdir()):
            raise UserError(f"{directory} is not empty: choose a new folder")
        if target.exists() and not target.is_dir():
            raise UserError(f"{directory} is a file: choose a new folder")
    except (OSError, RuntimeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"{directory} cannot be used: {reason}; choose a new folder") from None
    return target


def _load(name: str) -> "tuple[GPT, Origin | None]":
    """A model and where it comes from. name: as for model_loader.load_model.

    Raises UserError if there is no such model, or if its vocabulary is not GPT-2's.
    """
    import torch

    from folio.tokens import tokenizer
    from folio.tracking import model_loader, origin

    uri = tracking_uri()
    if model_loader.is_folder(name):
        _check_vocabulary(Path(name))
        found = origin.of_folder(Path(name))
    else:
        found = origin.of_model(name, uri)
    gpt = model_loader.load_model(name, uri, torch.device("cpu"))
    size = gpt.transformer.wte.num_embeddings
    if size < tokenizer.VOCAB_SIZE:
        raise UserError(
            f"{name} has {size:,} tokens instead of GPT-2's {tokenizer.VOCAB_SIZE:,}: only models"
            " with GPT-2's vocabulary can be exported"
        )
    return gpt, found


def _check_vocabulary(folder: Path) -> None:
    """Raise UserError if the folder has a tokenizer with a vocabulary other than GPT-2's."""
    from folio.tokens import tokenizer

    for name, keys in (("vocab.json", ()), ("tokenizer.json", ("model", "vocab"))):
        path = folder / name
        if not path.exists():
            continue
        try:
            content = json.loads(files.read(path, _MAX_VOCABULARY))
            for key in keys:
                content = content[key]
        except OSError as error:
            raise UserError(f"{path} cannot be read: {error.strerror}") from None
        except (ValueError, KeyError, TypeError, RecursionError):
            raise UserError(f"{path} is damaged: restore it, or remove it to use GPT-2's") from None
        if content != tokenizer.vocabulary():
            raise UserError(
                f"{path} is not GPT-2's vocabulary: only models with GPT-2's vocabulary can be"
                " exported"
            )
