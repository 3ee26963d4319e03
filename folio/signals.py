"""Stop requests: SIGTERM, Ctrl-C, a closed terminal, or the exit of the `dvc` that runs this stage.

A stop request raises Stopped wherever the program happens to be. Inside a `deferred` block, which
must not be interrupted halfway, the exception waits for the next `check` or `interruptible` block.
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

# The signals that request a stop: all that end a process by default, except those that report a
# fault in it (SIGSEGV, for example). Terminals send SIGHUP, SIGINT and SIGQUIT, schedulers SIGTERM,
# SIGUSR1, SIGUSR2 and SIGXCPU. Python ignores SIGPIPE and SIGXFSZ: writing raises OSError instead.
_NAMES = (
    *("SIGTERM", "SIGINT", "SIGHUP", "SIGQUIT", "SIGUSR1", "SIGUSR2", "SIGXCPU", "SIGALRM"),
    *("SIGVTALRM", "SIGPROF", "SIGABRT", "SIGIO", "SIGPWR", "SIGSTKFLT"),
)
STOPPING = tuple(int(getattr(signal, name)) for name in _NAMES if hasattr(signal, name))
if hasattr(signal, "SIGRTMIN"):
    STOPPING += tuple(range(signal.SIGRTMIN, signal.SIGRTMAX + 1))
SIGPIPE = 13  # some systems do not have it
# Signals from the keyboard; the second one exits immediately.
_KEYS: dict[int, str] = {signal.SIGINT: "Ctrl-C", signal.SIGQUIT: "Ctrl-\\"}

_deferred = False
_cause: str | None = None  # what requested the stop; None: no request so far
_requested_at = 0.0  # by time.monotonic
_status = 0  # the exit status for the signal: 128 + its number
_dvc_ended = False


class Stopped(BaseException):
    """A stop was requested. The message contains the cause and a hint on how to continue.

    It is not an Exception, so `except Exception` cannot swallow it.
    """

    def __init__(self, hint: str = "run the same command again to continue"):
        super().__init__(f"stopped by {_cause}; {hint}")
        self.status = _status  # the exit status to use

    @property
    def terminal_closed(self) -> bool:
        """Whether SIGHUP was the cause."""
        return self.status == 128 + signal.SIGHUP


@contextlib.contextmanager
def handled(report: Callable[[str], None]) -> Iterator[None]:
    """Handle the signals in STOPPING in this block, and stop when the parent `dvc` process exits.

    A signal that was ignored when the process started stays ignored: `nohup` ignores SIGHUP, and
    shell scripts ignore SIGINT for commands in the background. If `dvc` is killed, its stages keep
    running, and the next `dvc repro` would start a second trainer alongside the first. `report`
    prints a final message if the process does not exit in time.
    """
    global _cause, _deferred

    def on_signal(number: int, _: object) -> None:
        if _cause and number in _KEYS:
            _exit_now(report)
        if _dvc_ended:
            request("the exit of dvc", signal.SIGTERM, report)
        request(_name(number), number, report)

    _cause, _deferred = None, False
    # Signals with SIG_IGN are ignored; None is a handler of a library that was not set by Python.
    previous = {
        number: handler
        for number in STOPPING
        if (handler := signal.getsignal(number)) not in (signal.SIG_IGN, None)
    }
    for number in previous:
        signal.signal(number, on_signal)
    if _dvc and previous:
        threading.Thread(target=_stop_after, args=[_dvc, next(iter(previous))], daemon=True).start()
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def request(cause: str, number: int, report: Callable[[str], None]) -> None:
    """Request a stop, unless one was requested before: schedulers may send SIGTERM twice.

    number: the signal, which determines the exit status. Raises Stopped in the main thread, unless
    stop requests are deferred.
    """
    global _cause, _requested_at, _status
    if _cause:
        return
    _cause, _status, _requested_at = cause, 128 + number, time.monotonic()
    watchdog = threading.Timer(GRACE_PERIOD, _exit_now, [report])
    watchdog.daemon = True
    watchdog.start()
    if not _deferred and threading.current_thread() is threading.main_thread():
        raise Stopped


@contextlib.contextmanager
def deferred() -> Iterator[None]:
    """Defer stop requests until `check` or `interruptible`. A second Ctrl-C still exits
    immediately."""
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


def is_deferred() -> bool:
    """Whether a stop request would be deferred."""
    return _deferred


def seconds_left() -> float | None:
    """The seconds left for cleaning up after a stop request; None if there was no request."""
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


def _name(number: int) -> str:
    """How to name a signal: by the keys that send it, or as SIGTERM, or by its number."""
    names = {int(each): each.name for each in signal.Signals}
    return _KEYS.get(number) or names.get(number) or f"signal {number}"


def _stop_after(dvc: psutil.Process, number: int) -> None:
    """Wait for dvc to exit, then send this process a signal that it handles."""
    global _dvc_ended
    with contextlib.suppress(psutil.NoSuchProcess):
        while dvc.is_running() and dvc.status() != psutil.STATUS_ZOMBIE:
            time.sleep(1)
    _dvc_ended = True
    os.kill(os.getpid(), number)


def _exit_now(report: Callable[[str], None]) -> None:
    report(f"stopped by {_cause}; run the same command again to resume from the last checkpoint")
    os._exit(_status)
