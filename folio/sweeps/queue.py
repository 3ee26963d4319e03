"""DVC's queue of experiments, by its command line."""

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
class Queue:
    states: dict[str, str]  # experiment -> Queued, Running, Success or Failed
    workers: int  # that are alive


def overrides(settings: dict[str, Any]) -> list[str]:
    """The options of `dvc exp run` that lay {"train.steps": 1650, ...} over params.yaml."""
    return [
        word
        for key, value in settings.items()
        for word in ("--set-param", f"{key}={json.dumps(value, default=str)}")
    ]


def needs_dvc() -> None:
    """Raises UserError where there is no `dvc` on the PATH."""
    if not shutil.which("dvc"):
        raise UserError("dvc is not on the PATH: `make` puts it there, or activate .venv")


def put(name: str, settings: dict[str, Any]) -> None:
    """Queue an experiment. Raises UserError with DVC's words where it does not take it."""
    _dvc("exp", "run", "--queue", "--name", name, *overrides(settings))


def read() -> Queue:
    """As it is now. Raises UserError where DVC is in the middle of clearing it up."""
    rows = map(_ROW.fullmatch, _dvc("queue", "status").splitlines())
    return Queue(states={row[1]: row[2] for row in rows if row}, workers=count_workers())


def count_workers() -> int:
    """The workers of this project. DVC asks them, and takes those for gone that a busy machine lets
    answer too late; so their processes are counted."""
    here = str(Path.cwd())
    return sum(
        "queue-worker" in (process.info["cmdline"] or []) and process.info["cwd"] == here
        for process in psutil.process_iter(["cmdline", "cwd"])
    )


def start(workers: int, **variables: str) -> None:
    """Start workers, in the background, with these variables in the environment of what they run.

    They take what is queued, whoever queued it, and leave when there is no more.
    """
    _dvc("queue", "start", "--jobs", str(workers), **variables)


def stop() -> None:
    """End the workers and what they run; what waits stays queued.

    DVC kills its own processes. A training notices, saves its step and ends (folio/signals.py).
    """
    _dvc("queue", "stop", "--kill")


def remove(names: list[str]) -> None:
    """Take experiments that are not running out of the queue."""
    if names:
        _dvc("queue", "remove", *names)


def give_up(names: list[str]) -> None:
    """Mark as failed what a worker ran that is no more."""
    if names:
        _dvc("queue", "kill", "--force", *names)


def _dvc(*words: str, **variables: str) -> str:
    """What a dvc command prints. Ctrl-C does not reach it, for half of it may not be undone."""
    # A file, not a pipe: the workers that `start` leaves behind would hold a pipe open.
    with tempfile.TemporaryFile("w+") as printed:
        done = subprocess.run(
            ["dvc", *words],
            env=os.environ | variables,
            stdin=subprocess.DEVNULL,
            stdout=printed,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        printed.seek(0)
        text = printed.read()
    if done.returncode:
        lines = text.strip().splitlines() or ["no reason given"]
        why = next((line for line in lines if line.startswith("ERROR")), lines[-1])
        raise UserError(f"`dvc {' '.join(words[:2])}`: {why.removeprefix('ERROR: ')}")
    return text
