"""Device, precision, CUDA graphs, deterministic kernels and random seeds."""

import contextlib
import ctypes
import functools
import importlib.util
import os
import shutil
import sysconfig
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch

from folio.errors import UserError

T = TypeVar("T")

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def resolve_device(name: str) -> torch.device:
    """Return the named device; auto selects the first available of cuda, mps and cpu.

    Raises UserError if the named device is not available.
    """
    available = {
        "cuda": torch.cuda.is_available(),
        "mps": torch.backends.mps.is_available(),
        "cpu": True,
    }
    best = next(kind for kind, is_available in available.items() if is_available)
    if name == "auto":
        return torch.device(best)
    if not available[name]:
        raise UserError(
            f"runtime.device: PyTorch found no {name} device on this machine; use auto or {best}"
        )
    return torch.device(name)


def resolve_precision(name: str, device: torch.device) -> str:
    """Return the named precision; auto selects bf16 on a GPU with native bf16 support, otherwise
    fp32."""
    if name != "auto":
        return name
    return "bf16" if device.type == "cuda" and torch.cuda.is_bf16_supported(False) else "fp32"


@functools.cache
def can_compile() -> bool:
    """Whether torch.compile works on this machine.

    It requires Triton (included in PyTorch's CUDA builds for Linux), and Triton requires a C
    compiler and Python's headers.
    """
    headers = Path(sysconfig.get_path("include"), "Python.h")
    compilers = (os.environ.get("CC"), "gcc", "clang")
    found = any(shutil.which(compiler) for compiler in compilers if compiler)
    return importlib.util.find_spec("triton") is not None and found and headers.exists()


def capture(work: Callable[..., T], *inputs: torch.Tensor) -> Callable[..., T]:
    """Capture `work(*inputs)` as a CUDA graph; return a function that replays it.

    A small model's operators take longer to launch one by one than to compute. The returned
    function takes inputs of the same shapes, and each call overwrites the previous result. Calls
    `work` once before the capture, so it must not modify its inputs, and it must not synchronize
    with the device. Without a GPU, returns `work` itself.
    """
    if inputs[0].device.type != "cuda":
        return work
    static_inputs = [tensor.clone() for tensor in inputs]
    graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream()
    with torch.random.fork_rng([torch.cuda.current_device()]):
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            work(*static_inputs)
        torch.cuda.current_stream().wait_stream(stream)
        # So that the graph gets cuBLAS workspaces of its own. Otherwise it shares those of earlier
        # graphs, which PyTorch 2.12 and later free together with one of these graphs.
        torch._C._cuda_clearCublasWorkspaces()
        # thread_local: other threads, such as MLflow's, may still make calls that are forbidden
        # during a capture.
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            result = work(*static_inputs)

    def replay(*new_inputs: torch.Tensor) -> T:
        for static, new in zip(static_inputs, new_inputs, strict=True):
            static.copy_(new, non_blocking=True)
        graph.replay()
        return result

    return replay


@contextlib.contextmanager
def deterministic(enabled: bool) -> Iterator[None]:
    """In this block, if enabled, use only GPU kernels whose results are bitwise reproducible.

    This matters in the backward pass of attention over more than 128 tokens, where the fastest
    kernels add partial sums in the order in which they finish.
    """
    if not enabled:
        yield
        return
    settings: Any = torch.utils.deterministic  # its attribute is a property unknown to mypy
    fill_before = settings.fill_uninitialized_memory
    enabled_before = torch.are_deterministic_algorithms_enabled()
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # without it, cuBLAS raises
    torch.use_deterministic_algorithms(True)
    settings.fill_uninitialized_memory = False  # it costs time and changes no result here
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(enabled_before)
        settings.fill_uninitialized_memory = fill_before


def tune_malloc() -> None:
    """Make the C library keep freed memory, so that PyTorch reuses it in the next step on a CPU.

    By default glibc returns large blocks to the kernel, which then has to zero each page when it is
    used again. That takes a quarter of a small model's step time. Sets M_MMAP_MAX and
    M_TRIM_THRESHOLD (see mallopt(3)); does nothing if the C library has no mallopt.
    """
    if mallopt := getattr(ctypes.CDLL(None), "mallopt", None):
        mallopt(-4, 0)  # M_MMAP_MAX
        mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD


def seed(number: int) -> None:
    """Seed PyTorch's random number generators on all devices."""
    torch.manual_seed(number)


def seed_step(number: int, step: int, device: torch.device, rank: int = 0) -> None:
    """Seed the device's generator, which dropout uses, as a pure function of (number, step, rank).

    This way, checkpoints do not need to store the generator's state, and processes drop different
    activations.
    """
    words = [number, step, rank] if rank else [number, step]
    seeds = np.random.SeedSequence(words).generate_state(1, np.uint64)
    seed_device = {
        "cpu": torch.default_generator.manual_seed,
        "cuda": torch.cuda.manual_seed,
        "mps": torch.mps.manual_seed,
    }[device.type]
    seed_device(int(seeds[0]))


def describe(device: torch.device) -> str:
    """Return the name of the accelerator, or "cpu" with the number of threads."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    threads = torch.get_num_threads()
    return f"{device.type}, {threads} thread{'' if threads == 1 else 's'}"
