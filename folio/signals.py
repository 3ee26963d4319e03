"""A notice to stop: SIGTERM, Ctrl-C, or the end of the `dvc` that runs this stage.

It raises Stopped wherever the program is. In a `deferred` block, whose work is done whole or not at
all, it waits for the next `check`, or for an `allowed` block, which may be left at any moment.
"""

import contextlib
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil

GRACE = 8.0  # seconds from a notice to the end of the process, come what may

_deferred = False
_cause: str | None = None  # what told us to stop
_noticed = 0.0  # when, by time.monotonic
_status = 0  # the exit status that says so
_dvc_ended = False


class Stopped(BaseException):
    """Told to stop. Its text says what is left. Not an Exception, so that nothing swallows it."""

    def __init__(self, left: str = "run the same command again to go on"):
        super().__init__(f"stopped by {_cause}; {left}")
        self.status = _status  # to exit with


@contextlib.contextmanager
def handled(say: Callable[[str], None]) -> Iterator[None]:
    """Heed SIGTERM and SIGINT in this block, and end with the `dvc` that started this process.

    DVC, when it is killed, leaves its stages running, and the next `dvc repro` would start a second
    trainer beside the first. `say` prints the last words of a process that takes too long to end.
    """
    global _cause, _deferred

    def on_signal(number: int, _: object) -> None:
        global _cause, _noticed, _status
        if _cause:  # schedulers may say it twice; whoever presses Ctrl-C twice will not wait
            if number == signal.SIGINT:
                _leave_at_once(say)
            return
        name = "Ctrl-C" if number == signal.SIGINT else signal.Signals(number).name
        _cause = "the end of dvc" if _dvc_ended else name
        _status = 128 + number
        _noticed = time.monotonic()
        guard = threading.Timer(GRACE, _leave_at_once, [say])
        guard.daemon = True
        guard.start()
        if not _deferred:
            raise Stopped

    _cause, _deferred = None, False
    former = {
        number: signal.signal(number, on_signal) for number in (signal.SIGINT, signal.SIGTERM)
    }
    if _dvc:
        threading.Thread(target=_end_with, args=[_dvc], daemon=True).start()
    try:
        yield
    finally:
        for number, handler in former.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def deferred() -> Iterator[None]:
    """Hold a notice back until `check` or `allowed`. A second Ctrl-C ends the process at once."""
    global _deferred
    former, _deferred = _deferred, True
    try:
        yield
    finally:
        _deferred = former


@contextlib.contextmanager
def interruptible() -> Iterator[None]:
    """Within `deferred`: in this block a notice need not wait."""
    global _deferred
    former, _deferred = _deferred, False
    try:
        check()
        yield
    finally:
        _deferred = former


def check() -> None:
    """Raise Stopped if there was a notice."""
    if _cause:
        raise Stopped


def seconds_left() -> float | None:
    """How long there is for last words after a notice; None where there was no notice."""
    return max(0.0, _noticed + GRACE - 1.0 - time.monotonic()) if _cause else None


def _find_dvc() -> psutil.Process | None:
    """The process of the `dvc` command that runs this stage, where one does."""
    if "DVC_STAGE" in os.environ:
        with contextlib.suppress(psutil.Error):
            for process in psutil.Process().parents():
                if any(Path(word).name == "dvc" for word in process.cmdline()):
                    return process
    return None


_dvc = _find_dvc()  # now: it may be killed while PyTorch is imported


def _end_with(dvc: psutil.Process) -> None:
    global _dvc_ended
    with contextlib.suppress(psutil.NoSuchProcess):
        while dvc.is_running() and dvc.status() != psutil.STATUS_ZOMBIE:
            time.sleep(1)
    _dvc_ended = True
    os.kill(os.getpid(), signal.SIGTERM)


def _leave_at_once(say: Callable[[str], None]) -> None:
    say(f"stopped by {_cause}; the same command goes on from the last checkpoint")
    os._exit(_status)
