"""The names and checksums of the weight files in a model folder: model.safetensors, or several
shards with an index. Does not import PyTorch.

Hugging Face's libraries write shards, and an index that maps each tensor to its shard, for a model
larger than a limit; safetensors_files.write does too. All of them may be untrusted.
"""

import contextlib
import hashlib
import json
import reprlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from folio.errors import UserError
from folio.gpt import model_files
from folio.gpt.model_files import ModelFiles

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
PATTERN = "*.safetensors*"  # matches all of them
HINT = "download the folder or save the model again"

_MAX_INDEX = 1 << 24  # bytes; an entry has about 90, and GPT-2 has 12 entries per layer
_MAX_SHARDS = 400  # all are open at once; a process may often open 1,024 files


def sha256(folder: Path) -> str:
    """The SHA-256 of a folder's weights, in hex: that of model.safetensors, or that of a list of
    the SHA-256 hashes of the index and the shards.

    Raises UserError if files are missing or damaged.
    """
    return model_files.read(folder, _sha256)


def has_sha256(folder: Path, expected: str | None) -> bool:
    """Whether a folder has weights that can be read and have this SHA-256.

    expected: if None, only checks whether there are weights.
    """
    if expected is None:
        return any((folder / name).is_file() for name in (WEIGHTS, INDEX))
    try:
        return sha256(folder) == expected
    except UserError:
        return False


def _sha256(files: ModelFiles) -> str:
    if files.exists(WEIGHTS):
        return _sha256_of(files, WEIGHTS)
    names = sorted(read_index(files)) + [INDEX]
    listed = "".join(f"{_sha256_of(files, name)}  {name}\n" for name in names)
    return hashlib.sha256(listed.encode()).hexdigest()


def _sha256_of(files: ModelFiles, name: str) -> str:
    with damage(files.folder / name):
        return hashlib.file_digest(files.open(name), "sha256").hexdigest()


def read_index(files: ModelFiles) -> dict[str, set[str]]:
    """Map each shard to the names of its tensors. Raises UserError if the index is invalid."""
    path = files.folder / INDEX
    try:
        index = json.loads(files.read(INDEX, _MAX_INDEX))
        entries = index["weight_map"].items()
    except FileNotFoundError:
        raise UserError(
            f"{files.folder / WEIGHTS} is missing, and Folio does not read pickled weights:"
            " convert them with transformers' save_pretrained, which writes safetensors"
        ) from None
    except (ValueError, RecursionError, KeyError, TypeError, AttributeError):
        raise UserError(f"{path} is not an index of weight files: {HINT}") from None
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror or error}") from None
    shards: dict[str, set[str]] = {}
    for tensor, file in entries:
        if not _is_plain(file):
            raise UserError(
                f"{path} refers to the file {shorten(file)}; Folio only reads .safetensors files in"
                f" the same folder: {HINT}"
            )
        shards.setdefault(file, set()).add(tensor)
    if not 1 <= len(shards) <= _MAX_SHARDS:
        raise UserError(
            f"{path} refers to {len(shards):,} files; Folio reads 1 to {_MAX_SHARDS}: save the"
            " model with a larger max_shard_size"
        )
    return shards


def _is_plain(name: Any) -> bool:
    """Whether a name in an index refers to a file in the same folder."""
    if not isinstance(name, str) or len(name) > 255 or not name.isprintable():
        return False
    return name.endswith(".safetensors") and not set("/\\") & set(name)


@contextlib.contextmanager
def damage(path: Path) -> Iterator[None]:
    """Turn an error in this block, which reads the file, into a UserError."""
    try:
        yield
    except FileNotFoundError:
        raise UserError(f"{path} is missing: {HINT}") from None
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror or error}") from None
    except ValueError as error:
        raise UserError(f"{path} is damaged ({error}): {HINT}") from None


def shorten(value: Any) -> str:
    """An untrusted value, shortened to one line. (reprlib alone shows 6 levels of 6 items each.)"""
    return reprlib.repr(value)[:100]
