"""Which GPUs a process uses, alone or beside other trainings on the same machine."""

import contextlib
import hashlib
import itertools
import os
import re
import socket
from pathlib import Path

import filelock
import torch

from folio.distributed import is_started_by_launcher
from folio.errors import UserError

JOBS = "FOLIO_JOBS"  # environment variable: how many trainings of this project run at once

_held: list[filelock.FileLock] = []  # until the process ends


def visible() -> list[str]:
    """The GPUs that this process may use, as in CUDA_VISIBLE_DEVICES.

    CUDA ignores the names after the first one that is empty or negative.
    """
    listed = os.environ.get("CUDA_VISIBLE_DEVICES")
    names = listed.split(",") if listed else map(str, range(torch.cuda.device_count()))
    stripped = (name.strip() for name in names)
    return [*itertools.takewhile(lambda name: name and not name.startswith("-"), stripped)]


def reserve(project: Path) -> None:
    """If several trainings run at once, restrict this process to its share of the GPUs.

    Each of FOLIO_JOBS trainings gets the same number of GPUs, which no other one uses; if there are
    more trainings than GPUs, some share one. Call this before CUDA is initialized, since it sets
    CUDA_VISIBLE_DEVICES. Raises UserError if FOLIO_JOBS is not a positive number.
    """
    jobs = os.environ.get(JOBS) or "1"
    if not re.fullmatch("0*[1-9][0-9]{0,8}", jobs):
        raise UserError(f"{JOBS} is {jobs!r}: set it to the number of trainings that run at once")
    gpus = visible()
    if int(jobs) == 1 or len(gpus) < 2 or is_started_by_launcher():
        return
    parts = min(int(jobs), len(gpus))
    size = len(gpus) // parts
    shares = [",".join(gpus[part * size :][:size]) for part in range(parts)]
    os.environ["CUDA_VISIBLE_DEVICES"] = _lock_least_used(shares, project / ".dvc/tmp")


def _lock_least_used(shares: list[str], folder: Path) -> str:
    """Return the share of the GPUs that the fewest trainings on this machine have locked.

    The operating system unlocks it when this process ends, however it ends.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for number in itertools.count():
        for share in shares:
            name = hashlib.sha256(f"{socket.gethostname()} {share}".encode()).hexdigest()[:12]
            lock = filelock.FileLock(folder / f"gpus-{name}-{number}.lock")
            with contextlib.suppress(filelock.Timeout):
                lock.acquire(blocking=False)
                _held.append(lock)
                return share
    raise AssertionError
