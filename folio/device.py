"""Where the arithmetic runs and in which precision, and the seeds."""

import contextlib
import ctypes
from typing import Literal

import numpy as np
import torch

from folio.errors import UserError

Precision = Literal["auto", "bf16", "fp16", "fp32"]
Device = Literal["auto", "cuda", "mps", "cpu"]

_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def resolve_device(name: Device) -> torch.device:
    """auto is cuda where there is one, then mps, then cpu. Raises UserError where there is none."""
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


def autocast(device: torch.device, precision: str) -> contextlib.AbstractContextManager:
    """Mixed precision (Micikevicius et al. 2018): products in the given precision, sums in fp32."""
    if precision == "fp32":
        return contextlib.nullcontext()
    return torch.autocast(device.type, dtype=_DTYPES[precision])


def keep_memory() -> None:
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
