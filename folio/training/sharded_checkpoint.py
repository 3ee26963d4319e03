"""Tensors that are divided by rows among processes, on disk: one safetensors file per process.

torch.distributed.checkpoint writes them, and reads them into any other number of processes. Its
usual format contains pickles, so that of Hugging Face is used.
"""

from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard

Tensors = dict[str, torch.Tensor]


def save(folder: Path, parts: Tensors, rows: dict[str, int], mesh: DeviceMesh) -> None:
    """Write every process's part of each tensor. Collective.

    parts: the rows of each tensor in this process. rows: the number of rows in all processes.
    Raises OSError in all processes if one cannot write.
    """
    tensors = {name: _whole(part, rows[name], mesh) for name, part in parts.items()}
    writer = HuggingFaceStorageWriter(str(folder), save_distributed=True)
    try:
        dcp.save(dict(tensors), storage_writer=writer)
    except CheckpointException as problem:
        raise _first(problem) from None


def load(folder: Path, mesh: DeviceMesh | None) -> Tensors:
    """Read what `save` wrote: without a mesh, whole tensors; otherwise this process's part of each.
    Collective. Raises OSError or ValueError in all processes if a file is damaged."""
    reader = HuggingFaceStorageReader(str(folder))
    try:
        tensors: Tensors = {}
        for name, found in reader.read_metadata().state_dict_metadata.items():
            assert isinstance(found, TensorStorageMetadata)
            shape = list(found.size)
            if mesh:
                shape[0] = len(range(shape[0])[local_rows(shape[0], mesh)])
            empty = torch.empty(shape, dtype=found.properties.dtype)
            tensors[name] = _whole(empty, found.size[0], mesh) if mesh else empty
        dcp.load(tensors, storage_reader=reader, no_dist=mesh is None)
    except CheckpointException as problem:
        raise _first(problem) from None
    return {name: t.to_local() if isinstance(t, DTensor) else t for name, t in tensors.items()}


def local_rows(rows: int, mesh: DeviceMesh) -> slice:
    """Which of a tensor's rows this process has: those of DTensor's Shard(0)."""
    size = -(-rows // mesh.size())
    first = min(rows, size * mesh.get_local_rank())
    return slice(first, min(rows, first + size))


def _whole(part: torch.Tensor, rows: int, mesh: DeviceMesh) -> DTensor:
    """The tensor with that many rows, of which this process has a part."""
    shape = torch.Size([rows, *part.shape[1:]])
    stride = torch.empty(shape, device="meta").stride()
    return DTensor.from_local(part, mesh, [Shard(0)], run_check=False, shape=shape, stride=stride)


def _first(problem: CheckpointException) -> Exception:
    """The error of the first process that has failed, as an OSError or a ValueError."""
    error = next(iter(problem.failures.values()))[0]
    return error if isinstance(error, OSError) else ValueError(str(error))
