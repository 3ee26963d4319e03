"""Stop requests: SIGTERM, Ctrl-C, or the end of the `dvc` process that runs this stage.

A stop request raises Stopped wherever the program happens to be. Inside a `deferred` block, whose
work must not be left half done, the exception waits for the next `check` or `interruptible` block.
"""

import contextlib
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil

GRACE_PERIOD = 8.0  # seconds from a stop request until the process is forced to exit

_deferred = False
_cause: str | None = None  # what requested the stop; None: no request so far
_requested_at = 0.0  # by time.monotonic
_status = 0  # the exit status for the signal: 128 + its number
_dvc_ended = False


class Stopped(BaseException):
    """A stop was requested. The text gives the cause and a hint on how to continue.

    It is not an Exception, so that no `except Exception` swallows it.
    """

    def __init__(self, hint: str = "run the same command again to continue"):
        super().__init__(f"stopped by {_cause}; {hint}")
        self.status = _status  # the exit status to use


@contextlib.contextmanager
def handled(report: Callable[[str], None]) -> Iterator[None]:
    """Handle SIGTERM and SIGINT in this block, and stop when the parent `dvc` process ends.

    A killed DVC leaves its stages running, and the next `dvc repro` would start a second trainer
    beside the first. `report` prints a final message if the process does not end in time.
    """
    global _cause, _deferred

    def on_signal(number: int, _: object) -> None:
        global _cause, _requested_at, _status
        if _cause:  # schedulers may send SIGTERM twice; a second Ctrl-C means "at once"
            if number == signal.SIGINT:
                _exit_now(report)
            return
        name = "Ctrl-C" if number == signal.SIGINT else signal.Signals(number).name
        _cause = "the end of dvc" if _dvc_ended else name
        _status = 128 + number
        _requested_at = time.monotonic()
        watchdog = threading.Timer(GRACE_PERIOD, _exit_now, [report])
        watchdog.daemon = True
        watchdog.start()
        if not _deferred:
            raise Stopped

    _cause, _deferred = None, False
    previous = {
        number: signal.signal(number, on_signal) for number in (signal.SIGINT, signal.SIGTERM)
    }
    if _dvc:
        threading.Thread(target=_stop_after, args=[_dvc], daemon=True).start()
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def deferred() -> Iterator[None]:
    """Defer a stop request until `check` or `interruptible`. A second Ctrl-C still ends the
    process at once."""
    global _deferred
    previous, _deferred = _deferred, True
    try:
        yield
    finally:
        _deferred = previous


@contextlib.contextmanager
def interruptible() -> Iterator[None]:
    """Inside a `deferred` block: let a stop request raise Stopped immediately in this block."""
    global _deferred
    previous, _deferred = _deferred, False
    try:
        check()
        yield
    finally:
        _deferred = previous


def check() -> None:
    """Raise Stopped if a stop was requested."""
    if _cause:
        raise Stopped


def seconds_left() -> float | None:
    """Seconds that remain for cleaning up after a stop request; None if there was no request."""
    return max(0.0, _requested_at + GRACE_PERIOD - 1.0 - time.monotonic()) if _cause else None


def _find_dvc() -> psutil.Process | None:
    """The process of the `dvc` command that runs this stage, if any."""
    if "DVC_STAGE" in os.environ:
        with contextlib.suppress(psutil.Error):
            for process in psutil.Process().parents():
                if any(Path(word).name == "dvc" for word in process.cmdline()):
                    return process
    return None


_dvc = _find_dvc()  # at import: dvc may be killed while PyTorch is still being imported


def _stop_after(dvc: psutil.Process) -> None:
    """Wait for dvc to end, then request a stop of this process."""
    global _dvc_ended
    with contextlib.suppress(psutil.NoSuchProcess):
        while dvc.is_running() and dvc.status() != psutil.STATUS_ZOMBIE:
            time.sleep(1)
    _dvc_ended = True
    os.kill(os.getpid(), signal.SIGTERM)


def _exit_now(report: Callable[[str], None]) -> None:
    report(f"stopped by {_cause}; run the same command again to resume from the last checkpoint")
    os._exit(_status)
