"""Who may touch a variant's folder of checkpoints: one trainer, or what looks after it."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import filelock


@contextmanager
def only_trainer(folder: Path) -> Iterator[None]:
    """Keep a second trainer off the same checkpoints: wait, with a line, while one is at work."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    lock = _lock(folder)
    try:
        lock.acquire(blocking=False)
    except filelock.Timeout:
        print(
            f"another process is training this variant ({folder.name}): waiting for it to end",
            file=sys.stderr,
        )
        lock.acquire(poll_interval=0.5)
    try:
        folder.mkdir(exist_ok=True)
        yield
    finally:
        lock.release()


@contextmanager
def idle(folder: Path) -> Iterator[bool]:
    """Whether no trainer is at work on a variant; if so, none begins within the block."""
    lock = _lock(folder)
    try:
        lock.acquire(blocking=False)
    except filelock.Timeout:
        yield False
        return
    try:
        yield True
    finally:
        lock.release()


def _lock(folder: Path) -> filelock.FileLock:
    return filelock.FileLock(folder.with_suffix(".lock"))
