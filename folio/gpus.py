"""Which GPUs a process uses, alone or beside other trainings on the same machine."""

import itertools
import os
from pathlib import Path

import filelock
import torch

from folio.distributed import is_started_by_launcher
from folio.errors import UserError

JOBS = "FOLIO_JOBS"  # environment variable: how many trainings of this project run at once

_held: list[filelock.FileLock] = []  # until the process ends


def visible() -> list[str]:
    """The GPUs that this process may use, as in CUDA_VISIBLE_DEVICES."""
    names = os.environ.get("CUDA_VISIBLE_DEVICES")
    return names.split(",") if names else [str(n) for n in range(torch.cuda.device_count())]


def reserve(project: Path) -> None:
    """If several trainings run at once, restrict this process to its share of the GPUs.

    Each of FOLIO_JOBS trainings gets the same number of GPUs, which no other one uses; if there are
    more trainings than GPUs, some share one. Call this before CUDA is initialized, since it sets
    CUDA_VISIBLE_DEVICES. Raises UserError if FOLIO_JOBS is no positive number.
    """
    jobs = os.environ.get(JOBS) or "1"
    if not (jobs.isascii() and jobs.isdigit() and int(jobs)):
        raise UserError(f"{JOBS} is {jobs!r}: set it to the number of trainings that run at once")
    gpus = visible()
    if int(jobs) == 1 or len(gpus) < 2 or is_started_by_launcher():
        return
    parts = min(int(jobs), len(gpus))
    part, share = _lock_first_free_slot(project / ".dvc/tmp") % parts, len(gpus) // parts
    os.environ["CUDA_VISIBLE_DEVICES"] = ",".join(gpus[part * share :][:share])


def _lock_first_free_slot(folder: Path) -> int:
    """The operating system unlocks it when this process ends, however it ends."""
    folder.mkdir(parents=True, exist_ok=True)
    for slot in itertools.count():
        lock = filelock.FileLock(folder / f"job-{slot}.lock")
        try:
            lock.acquire(blocking=False)
        except filelock.Timeout:
            continue
        _held.append(lock)
        return slot
    raise AssertionError
