"""DVC's queue of experiments, through the `dvc` command."""

import os
import re
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from folio import commands
from folio.errors import UserError
from folio.sweeps.overrides import param_options

_ROW = re.compile(r"\w{7}\s+(\S+)\s.*\s(Queued|Running|Success|Failed)\s*")

# The characters that the queue does not support in the path of a project: DVC writes the path to a
# file:// URL without quoting, and to an ASCII file.
_UNSUPPORTED = re.compile("[#\x80-\U0010ffff]")


@dataclass(frozen=True)
class QueueStatus:
    states: dict[str, str]  # experiment -> Queued, Running, Success or Failed
    workers: int  # live worker processes


def require_dvc() -> None:
    """Raise UserError if `dvc` is not on the PATH."""
    if not shutil.which("dvc"):
        raise UserError("dvc is not on the PATH: activate .venv, which `make` creates")


def check_folder() -> None:
    """Raise UserError if DVC cannot run queued experiments in this folder because of its name."""
    if found := _UNSUPPORTED.search(str(Path.cwd())):
        raise UserError(
            f"DVC cannot run queued experiments in a folder whose path contains {found[0]!r}:"
            " rename the folder, or use `dvc exp run` without --queue"
        )


def add(name: str, settings: dict[str, Any]) -> None:
    """Queue an experiment. Raises UserError with DVC's message if DVC rejects it, or if DVC would
    change a value."""
    _dvc("exp", "run", "--queue", "--name", name, *param_options(settings))


def read() -> QueueStatus:
    """The queue's current status. Raises UserError while DVC is cleaning up the queue."""
    rows = map(_ROW.fullmatch, _dvc("queue", "status").splitlines())
    return QueueStatus(states={row[1]: row[2] for row in rows if row}, workers=count_workers())


def count_workers() -> int:
    """The number of this project's worker processes.

    They are counted in the process table, because DVC considers a worker dead if it responds slowly
    on a busy machine.
    """
    here = str(Path.cwd())
    return sum(
        "queue-worker" in (process.info["cmdline"] or []) and process.info["cwd"] == here
        for process in psutil.process_iter(["cmdline", "cwd"])
    )


def start(workers: int, **variables: str) -> None:
    """Start workers in the background, with these environment variables.

    They run everything in the queue, including other experiments, and exit once it is empty.
    """
    _dvc("queue", "start", "--jobs", str(workers), **variables)


def stop() -> None:
    """Stop the workers and the experiments they run. Queued experiments stay queued.

    DVC kills only its own processes. The train stage detects that, saves a checkpoint and exits
    (folio/signals.py).
    """
    _dvc("queue", "stop", "--kill")


def remove(names: list[str]) -> None:
    """Remove experiments from the queue. They must not be running."""
    if names:
        _dvc("queue", "remove", *names)


def mark_failed(names: list[str]) -> None:
    """Mark experiments whose worker no longer exists as failed."""
    if names:
        _dvc("queue", "kill", "--force", *names)


def _dvc(*words: str, **variables: str) -> str:
    """Run a dvc command and return its output. Ctrl-C does not reach the command, which could
    otherwise stop halfway through a change. Raises UserError with DVC's message if it fails."""
    # A file instead of a pipe, because the workers started by `start` would keep a pipe open.
    with tempfile.TemporaryFile("w+", encoding="utf-8", errors="backslashreplace") as output:
        done = subprocess.run(
            ["dvc", *words],
            env=os.environ | variables,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        output.seek(0)
        text = output.read()
    if done.returncode:
        raise UserError(f"`dvc {' '.join(words[:2])}` failed: {commands.dvc_error(text)}")
    return text
