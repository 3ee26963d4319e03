"""The tensors in a model folder: in a single safetensors file, or in several with an index.

For a model larger than its `max_shard_size`, transformers' save_pretrained writes several files, or
shards, and an index that maps each tensor to its file. All of them may be untrusted.
"""

import contextlib
import hashlib
import json
import os
import reprlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from folio.errors import UserError
from folio.gpt import model_files
from folio.gpt.model_files import ModelFiles

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
HINT = "download the folder or save the model again"

_MAX_INDEX = 1 << 24  # bytes; an entry has about 90, and GPT-2 has 12 entries per layer
_MAX_SHARDS = 400  # all are open at once; a process may often open 1,024 files


class Tensors:
    """The headers of all weight files, and their tensors. Its methods raise UserError."""

    def __init__(self, files: ModelFiles, stack: contextlib.ExitStack):
        """Open the files until `stack` is closed. Raises UserError if one is missing or damaged."""
        self._files, self._stack = files, stack
        self._handles: dict[str, safe_open] = {}  # by the name of a tensor
        self._paths: dict[str, Path] = {}
        self._copies: list[tuple[Path, Callable[[], None]]] = []
        expected = _read_index(files) if not files.exists(WEIGHTS) else {WEIGHTS: None}
        for file, names in expected.items():
            handle = self._open(file)
            found = set(handle.keys())
            if names is not None and names != found:
                example = min(names ^ found)
                raise UserError(
                    f"{files.folder / INDEX} does not match {file} ({shorten(example)}): {HINT}"
                )
            self._handles |= dict.fromkeys(sorted(found), handle)
            self._paths |= dict.fromkeys(found, files.folder / file)

    def names(self) -> list[str]:
        return list(self._handles)

    def header(self, name: str) -> tuple[str, list[int]]:
        """A tensor's dtype, as in safetensors, and its shape."""
        header = self._handles[name].get_slice(name)
        return header.get_dtype(), header.get_shape()

    def read(self) -> None:
        """Read the content of all files. Must be called before `tensor`."""
        for path, complete in self._copies:
            with _damage(path):
                complete()

    def tensor(self, name: str) -> torch.Tensor:
        with _damage(self._paths[name]):
            return self._handles[name].get_tensor(name)

    def _open(self, file: str) -> safe_open:
        with _damage(self._files.folder / file):
            copy, complete = self._stack.enter_context(
                model_files.private_copy(self._files.descriptor(file))
            )
            self._copies.append((self._files.folder / file, complete))
            return self._stack.enter_context(safe_open(copy, framework="pt"))


def sha256(folder: Path) -> str:
    """The SHA-256 of a folder's weights, in hex: that of model.safetensors, or that of a list with
    the SHA-256 of the index and of each shard. Raises UserError if files are missing or damaged."""
    return model_files.read(folder, (WEIGHTS,), _sha256)


def _sha256(files: ModelFiles) -> str:
    if files.exists(WEIGHTS):
        return _sha256_of(files, WEIGHTS)
    names = sorted(_read_index(files)) + [INDEX]
    listed = "".join(f"{_sha256_of(files, name)}  {name}\n" for name in names)
    return hashlib.sha256(listed.encode()).hexdigest()


def _sha256_of(files: ModelFiles, name: str) -> str:
    digest, at = hashlib.sha256(), 0
    with _damage(files.folder / name):
        while chunk := os.pread(files.descriptor(name), 1 << 22, at):
            digest.update(chunk)
            at += len(chunk)
    return digest.hexdigest()


def _read_index(files: ModelFiles) -> dict[str, set[str]]:
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
        raise UserError(f"{path} cannot be read ({_reason(error)}): {HINT}") from None
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
    files.open(shards)
    return shards


def _is_plain(name: Any) -> bool:
    """Whether a name in an index refers to a file in the same folder."""
    if not isinstance(name, str) or len(name) > 255 or not name.isprintable():
        return False
    return name.endswith(".safetensors") and not set("/\\") & set(name)


@contextlib.contextmanager
def _damage(path: Path) -> Iterator[None]:
    """Raise UserError for an error while reading the file."""
    try:
        yield
    except FileNotFoundError:
        raise UserError(f"{path} is missing: {HINT}") from None
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path} is damaged ({_reason(error)!r}): {HINT}") from None


def _reason(error: Exception) -> str:
    text = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return text[:150]  # it may quote the file


def shorten(value: Any) -> str:
    """An untrusted value, shortened to one line. (reprlib alone shows 6 levels of 6 items each.)"""
    return reprlib.repr(value)[:100]
