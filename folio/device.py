"""The device and precision to compute in, CUDA graphs, determinism and seeds."""

import contextlib
import ctypes
import functools
import importlib.util
import os
import shutil
import sysconfig
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Literal, TypeVar

import numpy as np
import torch

from folio.errors import UserError

T = TypeVar("T")
Precision = Literal["auto", "bf16", "fp16", "fp32"]

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def resolve_device(name: str) -> torch.device:
    """auto is the first of cuda, mps and cpu that is there. Raises UserError where a named one is
    not."""
    there = {
        "cuda": torch.cuda.is_available(),
        "mps": torch.backends.mps.is_available(),
        "cpu": True,
    }
    if name == "auto":
        name = next(kind for kind, is_there in there.items() if is_there)
    elif not there[name]:
        best = next(kind for kind, is_there in there.items() if is_there)
        raise UserError(f"runtime.device: {name}, but PyTorch sees none here; take auto or {best}")
    return torch.device(name)


def resolve_precision(name: Precision, device: torch.device) -> str:
    """auto is bf16 on a GPU that computes in it, else fp32."""
    if name != "auto":
        return name
    return "bf16" if device.type == "cuda" and torch.cuda.is_bf16_supported(False) else "fp32"


@functools.cache
def can_compile() -> bool:
    """Whether torch.compile works here: Triton (part of PyTorch's CUDA builds for Linux), a C
    compiler and Python's headers, which Triton calls, are installed."""
    headers = Path(sysconfig.get_path("include"), "Python.h")
    compilers = (os.environ.get("CC"), "gcc", "clang")
    found = any(shutil.which(compiler) for compiler in compilers if compiler)
    return importlib.util.find_spec("triton") is not None and found and headers.exists()


def capture(work: Callable[..., T], *inputs: torch.Tensor) -> Callable[..., T]:
    """Work on a GPU's tensors as one CUDA graph, which is called with others of the same shapes.

    Launching operators one by one takes a small model longer than computing them. To record it,
    work is done beforehand: it must not wait for the device, nor change what it starts from. What
    it returns is overwritten by the next call. Without a GPU this gives work itself.
    """
    if inputs[0].device.type != "cuda":
        return work
    kept = [tensor.clone() for tensor in inputs]
    graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream()
    with torch.random.fork_rng([torch.cuda.current_device()]):
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            work(*kept)
        torch.cuda.current_stream().wait_stream(stream)
        # Other threads, MLflow's say, may go on with what is forbidden in here.
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            result = work(*kept)

    def again(*new: torch.Tensor) -> T:
        for old, tensor in zip(kept, new, strict=True):
            old.copy_(tensor, non_blocking=True)
        graph.replay()
        return result

    return again


@contextlib.contextmanager
def deterministic(wanted: bool) -> Iterator[None]:
    """Within it PyTorch takes those of a GPU's kernels that give the same bits each time.

    It matters in the backward pass of attention over more than 128 tokens: its fastest kernels add
    up in whatever order their parts end.
    """
    if not wanted:
        yield
        return
    filled = torch.utils.deterministic.fill_uninitialized_memory
    before = torch.are_deterministic_algorithms_enabled()
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # else matrix products raise
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # it would be time for nothing
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)
        torch.utils.deterministic.fill_uninitialized_memory = filled


def tune_malloc() -> None:
    """Let the C library keep what is freed: PyTorch takes it again, on a CPU, at the next step.

    glibc gives large blocks back to the system, which clears each page anew when it is touched: a
    quarter of a small model's step (mallopt(3), M_MMAP_MAX and M_TRIM_THRESHOLD).
    """
    if mallopt := getattr(ctypes.CDLL(None), "mallopt", None):
        mallopt(-4, 0)
        mallopt(-1, 2**31 - 1)


def seed(number: int) -> None:
    """Seed PyTorch's generators, on every device."""
    torch.manual_seed(number)


def seed_step(number: int, step: int, device: torch.device) -> None:
    """Seed the generator that dropout draws from, as a pure function of (number, step).

    So a training that goes on from a checkpoint needs no generator's state.
    """
    seeds = np.random.SeedSequence([number, step]).generate_state(1, np.uint64)
    seed_device = {
        "cpu": torch.default_generator.manual_seed,
        "cuda": torch.cuda.manual_seed,
        "mps": torch.mps.manual_seed,
    }[device.type]
    seed_device(int(seeds[0]))


def describe(device: torch.device) -> str:
    """For people: the accelerator's name, or how many CPU threads compute."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{device.type}, {torch.get_num_threads()} threads"
