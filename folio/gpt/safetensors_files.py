"""The tensors in a model folder: in a single safetensors file, or in several with an index.

For a model larger than its `max_shard_size`, transformers' save_pretrained writes several files, or
shards, and an index that maps each tensor to its file. All of them may be untrusted.

The tensors are read into memory. The safetensors library maps the file instead, so the process is
killed (SIGBUS) if another program truncates the file, even long after the model was loaded.
"""

import contextlib
import hashlib
import json
import math
import os
import reprlib
from collections.abc import Iterator
from dataclasses import dataclass
from io import BufferedReader
from pathlib import Path
from typing import Any

import torch

from folio.errors import UserError
from folio.gpt import model_files
from folio.gpt.model_files import ModelFiles

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
HINT = "download the folder or save the model again"

# The floats of the format: https://huggingface.co/docs/safetensors
FLOATS = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
}
_MAX_HEADER = 100_000_000  # bytes; the limit of the safetensors library
_MAX_INDEX = 1 << 24  # bytes; an entry has about 90, and GPT-2 has 12 entries per layer
_MAX_SHARDS = 400  # all are open at once; a process may often open 1,024 files


@dataclass(frozen=True)
class StoredTensor:
    """A tensor in a file, which has not been read yet."""

    path: Path
    file: BufferedReader
    dtype: str  # as in the format
    shape: list[int]
    start: int  # its position in the file, bytes
    end: int

    def read(self) -> torch.Tensor:
        """Read the tensor, whose dtype must be one of FLOATS. Raises UserError."""
        try:
            content = torch.empty(self.end - self.start, dtype=torch.uint8)
        except RuntimeError:
            raise UserError(f"{self.path}: there is not enough memory for its tensors") from None
        with _damage(self.path):
            self.file.seek(self.start)
            if self.file.readinto(content.numpy().data) < len(content):
                raise ValueError("it is truncated")
        return content.view(FLOATS[self.dtype]).view(self.shape)


def stored_tensors(files: ModelFiles) -> dict[str, StoredTensor]:
    """All tensors of a model, by name. Raises UserError if a file is missing or damaged."""
    if files.exists(WEIGHTS):
        return _read_header(files, WEIGHTS)
    tensors: dict[str, StoredTensor] = {}
    for file, names in _read_index(files).items():
        found = _read_header(files, file)
        if different := names ^ found.keys():
            raise UserError(
                f"{files.folder / INDEX} does not match {file} ({shorten(min(different))}): {HINT}"
            )
        tensors |= found
    return tensors


def sha256(folder: Path) -> str:
    """The SHA-256 of a folder's weights, in hex: that of model.safetensors, or that of a list of
    the SHA-256 hashes of the index and the shards.

    Raises UserError if files are missing or damaged.
    """
    return model_files.read(folder, _sha256)


def _sha256(files: ModelFiles) -> str:
    if files.exists(WEIGHTS):
        return _sha256_of(files, WEIGHTS)
    names = sorted(_read_index(files)) + [INDEX]
    listed = "".join(f"{_sha256_of(files, name)}  {name}\n" for name in names)
    return hashlib.sha256(listed.encode()).hexdigest()


def _sha256_of(files: ModelFiles, name: str) -> str:
    with _damage(files.folder / name):
        return hashlib.file_digest(files.open(name), "sha256").hexdigest()


def _read_header(files: ModelFiles, name: str) -> dict[str, StoredTensor]:
    """The tensors in a file: its length and its header must be consistent."""
    path = files.folder / name
    with _damage(path):
        file = files.open(name)
        size = os.fstat(file.fileno()).st_size
        length = int.from_bytes(file.read(8), "little")
        if not 0 < length <= min(size - 8, _MAX_HEADER):
            raise ValueError("its header is incomplete or too large")
        try:
            header = json.loads(file.read(length))
            header.pop("__metadata__", None)
            found = {key: _parse_entry(path, file, 8 + length, header[key]) for key in header}
        except (ValueError, RecursionError, KeyError, TypeError, AttributeError):
            raise ValueError("its header is invalid") from None
        # Without gaps or overlaps, the tensors take no more memory than the file.
        end = 8 + length
        for tensor in sorted(found.values(), key=lambda each: (each.start, each.end)):
            if tensor.start != end:
                raise ValueError("its header is invalid")
            end = tensor.end
        if end != size:
            raise ValueError(f"it has {size:,} bytes instead of {end:,}")
    return found


def _parse_entry(
    path: Path, file: BufferedReader, data: int, entry: dict[str, Any]
) -> StoredTensor:
    """A tensor in a header. data: the position of the data. Raises ValueError, KeyError or
    TypeError."""
    dtype, shape, (start, end) = entry["dtype"], entry["shape"], entry["data_offsets"]
    if len(shape) > 8 or start > end:
        raise ValueError
    if not all(type(n) is int and 0 <= n < 1 << 63 for n in (*shape, start, end)):
        raise ValueError
    if dtype in FLOATS and end - start != math.prod(shape) * FLOATS[dtype].itemsize:
        raise ValueError
    return StoredTensor(path, file, dtype, list(shape), data + start, data + end)


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
def _damage(path: Path) -> Iterator[None]:
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
