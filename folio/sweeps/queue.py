"""DVC's queue of experiments, through the `dvc` command."""

import json
import os
import re
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from folio.errors import UserError

_ROW = re.compile(r"\w{7}\s+(\S+)\s.*\s(Queued|Running|Success|Failed)\s*")


@dataclass(frozen=True)
class QueueStatus:
    states: dict[str, str]  # experiment -> Queued, Running, Success or Failed
    workers: int  # live worker processes


def param_options(settings: dict[str, Any]) -> list[str]:
    """The options of `dvc exp run` that override params.yaml with {"train.steps": 1650, ...}."""
    return [
        word
        for key, value in settings.items()
        for word in ("--set-param", f"{key}={json.dumps(value, default=str)}")
    ]


def require_dvc() -> None:
    """Raise UserError if `dvc` is not on the PATH."""
    if not shutil.which("dvc"):
        raise UserError("dvc is not on the PATH: activate .venv, which `make` creates")


def add(name: str, settings: dict[str, Any]) -> None:
    """Queue an experiment. Raises UserError with DVC's message if DVC rejects it."""
    _dvc("exp", "run", "--queue", "--name", name, *param_options(settings))


def read() -> QueueStatus:
    """The queue's present status. Raises UserError while DVC is cleaning the queue up."""
    rows = map(_ROW.fullmatch, _dvc("queue", "status").splitlines())
    return QueueStatus(states={row[1]: row[2] for row in rows if row}, workers=count_workers())


def count_workers() -> int:
    """The number of this project's worker processes.

    They are counted in the process table, because DVC considers a worker dead that is slow to
    answer on a busy machine.
    """
    here = str(Path.cwd())
    return sum(
        "queue-worker" in (process.info["cmdline"] or []) and process.info["cwd"] == here
        for process in psutil.process_iter(["cmdline", "cwd"])
    )


def start(workers: int, **variables: str) -> None:
    """Start workers in the background, with these environment variables.

    They run everything in the queue, including other experiments, and exit when it is empty.
    """
    _dvc("queue", "start", "--jobs", str(workers), **variables)


def stop() -> None:
    """Stop the workers and the experiments they run. Queued experiments stay queued.

    DVC kills only its own processes. A training notices that, saves a checkpoint and exits
    (folio/signals.py).
    """
    _dvc("queue", "stop", "--kill")


def remove(names: list[str]) -> None:
    """Remove experiments that are not running from the queue."""
    if names:
        _dvc("queue", "remove", *names)


def mark_failed(names: list[str]) -> None:
    """Mark experiments as failed whose worker no longer exists."""
    if names:
        _dvc("queue", "kill", "--force", *names)


def _dvc(*words: str, **variables: str) -> str:
    """The output of a dvc command. Ctrl-C does not reach the command, which could otherwise stop
    halfway through a change. Raises UserError with DVC's message if it fails."""
    # A file and not a pipe, because the workers that `start` leaves behind would keep a pipe open.
    with tempfile.TemporaryFile("w+") as output:
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
        lines = text.strip().splitlines() or ["no reason given"]
        reason = next((line for line in lines if line.startswith("ERROR")), lines[-1])
        raise UserError(f"`dvc {' '.join(words[:2])}` failed: {reason.removeprefix('ERROR: ')}")
    return text
