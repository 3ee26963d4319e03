"""Reads and writes the tensors of a model folder, in the safetensors format.

The files may be untrusted, and the tensors are read into memory: the safetensors library maps the
file instead, so the process is killed (SIGBUS) if another program truncates the file, even long
after the model was loaded.

The tensors are written one by one, straight to their places in the files. That library needs all
tensors of a file in memory, and reports a full disk without its errno.
"""

import contextlib
import json
import math
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from io import BufferedReader, FileIO
from pathlib import Path
from typing import Any

import torch

from folio.errors import UserError
from folio.gpt.model_files import ModelFiles
from folio.gpt.weight_files import HINT, INDEX, WEIGHTS, damage, read_index, shorten

# The floats of the format: https://huggingface.co/docs/safetensors
FLOATS = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
}
_MAX_HEADER = 100_000_000  # bytes; the limit of the safetensors library
MAX_SHARD = 5 * 10**9  # bytes of tensors in a file; the limit of the huggingface_hub library


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
        with damage(self.path):
            self.file.seek(self.start)
            if self.file.readinto(content.numpy().data) < len(content):
                raise ValueError("it is truncated")
        return content.view(FLOATS[self.dtype]).view(self.shape)


def stored_tensors(files: ModelFiles) -> dict[str, StoredTensor]:
    """All tensors of a model, by name. Raises UserError if a file is missing or damaged."""
    if files.exists(WEIGHTS):
        return _read_header(files, WEIGHTS)
    tensors: dict[str, StoredTensor] = {}
    for file, names in read_index(files).items():
        found = _read_header(files, file)
        if different := names ^ found.keys():
            raise UserError(
                f"{files.folder / INDEX} does not match {file} ({shorten(min(different))}): {HINT}"
            )
        tensors |= found
    return tensors


def _read_header(files: ModelFiles, name: str) -> dict[str, StoredTensor]:
    """The tensors in a file: its length and its header must be consistent."""
    path = files.folder / name
    with damage(path):
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


def write(
    folder: Path,
    shapes: Mapping[str, Sequence[int]],
    tensors: Iterable[tuple[str, torch.Tensor]],
) -> None:
    """Write tensors in fp32 to model.safetensors or, if they have more than MAX_SHARD bytes, to
    shards and their index. The files have the content that transformers would give them.

    shapes: of all tensors, by name. tensors: each of them once, in any order and on any device; no
    more than one is copied at a time. Flushes the files to disk. Raises OSError.
    """
    shards = _split(shapes)
    places: dict[str, tuple[FileIO, int]] = {}  # of each tensor: its file, and its position there
    with contextlib.ExitStack() as opened:
        for shard, names in shards.items():
            file = opened.enter_context(_create(folder / shard))
            header = _header({name: shapes[name] for name in names})
            _write(file, memoryview(header))
            end = len(header)
            for name in sorted(names):
                places[name] = file, end
                end += _bytes(shapes[name])
        for name, tensor in tensors:
            assert tensor.shape == torch.Size(shapes[name]), f"{name}: {tensor.shape}"
            file, start = places.pop(name)
            file.seek(start)
            _write(file, tensor.detach().float().cpu().contiguous().numpy().data.cast("B"))
        assert not places, f"without a value: {', '.join(places)}"
    if len(shards) > 1:
        with _create(folder / INDEX) as file:
            _write(file, memoryview(_index(shards, shapes)))


@contextlib.contextmanager
def _create(path: Path) -> Iterator[FileIO]:
    """A new file, which is flushed to disk at the end of the block."""
    with path.open("wb", buffering=0) as file:
        yield file
        os.fsync(file)


def _split(shapes: Mapping[str, Sequence[int]]) -> dict[str, list[str]]:
    """The names of the tensors in each file, by its name.

    A tensor goes into the same file as the one before it, unless that exceeds MAX_SHARD.
    """
    parts: list[list[str]] = [[]]
    total = 0  # bytes in the last part
    for name, shape in shapes.items():
        if parts[-1] and total + _bytes(shape) > MAX_SHARD:
            parts.append([])
            total = 0
        parts[-1].append(name)
        total += _bytes(shape)
    if len(parts) == 1:
        return {WEIGHTS: parts[0]}
    count = len(parts)
    return {f"model-{n:05}-of-{count:05}.safetensors": part for n, part in enumerate(parts, 1)}


def _header(shapes: Mapping[str, Sequence[int]]) -> bytes:
    """The beginning of a file with these tensors, in the order of their names, up to the first."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, shape in sorted(shapes.items()):
        offsets = [end, end := end + _bytes(shape)]
        header[name] = {"dtype": "F32", "shape": list(shape), "data_offsets": offsets}
    content = json.dumps(header, separators=(",", ":")).encode()
    content += b" " * (-len(content) % 8)  # the tensors start at a multiple of 8 bytes
    return len(content).to_bytes(8, "little") + content


def _index(shards: Mapping[str, list[str]], shapes: Mapping[str, Sequence[int]]) -> bytes:
    number = sum(math.prod(shape) for shape in shapes.values())
    index = {
        "metadata": {"total_parameters": number, "total_size": 4 * number},
        "weight_map": {name: file for file, names in shards.items() for name in names},
    }
    return (json.dumps(index, indent=2, sort_keys=True) + "\n").encode()


def _bytes(shape: Sequence[int]) -> int:
    return 4 * math.prod(shape)


def _write(file: FileIO, content: memoryview) -> None:
    while content:
        content = content[file.write(content) :]  # Linux writes at most 2 GiB at once
