"""Stop requests: SIGTERM, Ctrl-C, a closed terminal, or the exit of the `dvc` that runs this stage.

A stop request raises Stopped wherever the program happens to be. Inside a `deferred` block, which
must not be interrupted halfway, the exception waits for the next `check` or `interruptible` block.
"""

import contextlib
import os
import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import NoReturn

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
_raised = False  # whether a request raised Stopped where the program was
_cause: str | None = None  # what requested the stop; None: no request so far
_requested_at = 0.0  # by time.monotonic
_status = 0  # the exit status for the signal: 128 + its number
_ended = ""  # what has exited, of those processes that this one must not outlive
_passed_on: "PassedOn | None" = None


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
    prints a final message if the process does not exit in time. If a library swallows Stopped, as
    some do while they are imported, the end of the block raises it again.
    """
    global _cause, _deferred, _raised

    def on_signal(number: int, _: object) -> None:
        if _passed_on:
            _passed_on.add(number)
            return
        if _cause and number in _KEYS:
            _exit_now(report)
        if _ended:
            request(f"the exit of {_ended}", signal.SIGTERM, report)
        request(name(number), number, report)

    _cause, _deferred, _raised = None, False, False
    # Signals with SIG_IGN are ignored; None is a handler of a library that was not set by Python.
    previous = {
        number: handler
        for number in STOPPING
        if (handler := signal.getsignal(number)) not in (signal.SIG_IGN, None)
    }
    for number in previous:
        signal.signal(number, on_signal)
    for process, description in _supervisors.items() if previous else ():
        args = [process, description, next(iter(previous))]
        threading.Thread(target=_stop_after, args=args, daemon=True).start()
    try:
        yield
        if _raised:
            raise Stopped
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def request(cause: str, number: int, report: Callable[[str], None]) -> None:
    """Request a stop, unless one was requested before: schedulers may send SIGTERM twice.

    number: the signal, which determines the exit status. Raises Stopped in the main thread, unless
    stop requests are deferred.
    """
    global _cause, _raised, _requested_at, _status
    if _cause:
        return
    _cause, _status, _requested_at = cause, 128 + number, time.monotonic()
    watchdog = threading.Timer(GRACE_PERIOD, _exit_now, [report])
    watchdog.daemon = True
    watchdog.start()
    if not _deferred and threading.current_thread() is threading.main_thread():
        _raised = True
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


class PassedOn:
    """The stop requests to be passed on to other processes, which stop by themselves."""

    def __init__(self) -> None:
        self.number = 0  # the signal of the latest request; 0: there was none
        self._requests = 0
        self._first = 0.0  # the time of the first one, by time.monotonic
        self._sent: dict[int, int] = {}  # by process: the number of requests sent

    def add(self, number: int) -> None:
        self.number = number
        self._first = self._first or time.monotonic()
        self._requests += 1

    def to(self, processes: Iterable[psutil.Process]) -> None:
        """Send the processes those requests that they have not been sent yet. After the grace
        period and two seconds more, kill them."""
        overdue = self.number and time.monotonic() > self._first + GRACE_PERIOD + 2.0
        for process in processes:
            with contextlib.suppress(psutil.NoSuchProcess):
                if overdue:
                    process.kill()
                for _ in range(self._sent.get(process.pid, 0), self._requests):
                    process.send_signal(self.number)
            self._sent[process.pid] = self._requests


@contextlib.contextmanager
def passed_on() -> Iterator[PassedOn]:
    """Collect stop requests in this block, instead of stopping this process."""
    global _passed_on
    check()
    _passed_on = PassedOn()
    try:
        yield _passed_on
    finally:
        _passed_on = None


def check() -> None:
    """Raise Stopped if a stop was requested."""
    if _cause:
        raise Stopped


def requested() -> int:
    """The number of the signal that requested a stop; 0 if there was no request."""
    return _status - 128 if _cause else 0


def request_elsewhere(number: int, report: Callable[[str], None]) -> None:
    """Request a stop like that of another process of this training run, which got the signal."""
    with deferred():
        request(name(number), number, report)


def exit_even_if_blocked(report: Callable[[str], None]) -> None:
    """From now on, exit after the grace period even if the main thread is blocked in C code.

    Python handles signals between two instructions of the main thread, which may be waiting for
    another process that no longer exists.
    """
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    signal.set_wakeup_fd(writing, warn_on_full_buffer=False)

    def wait() -> None:
        global _cause, _status
        number = 0
        while number not in STOPPING:
            [number] = os.read(reading, 1)
        time.sleep(GRACE_PERIOD)
        if not _cause:
            _cause, _status = name(number), 128 + number
        _exit_now(report)

    threading.Thread(target=wait, name="watchdog", daemon=True).start()


def end_process() -> NoReturn:
    """End as if the signal that requested the stop was not handled: the parent process sees which
    one it was, and reports it."""
    signal.signal(requested(), signal.SIG_DFL)
    os.kill(os.getpid(), requested())
    os._exit(_status)  # the signal is blocked, which the parent process may do


def is_deferred() -> bool:
    """Whether a stop request would be deferred."""
    return _deferred


def seconds_left() -> float | None:
    """The seconds left for cleaning up after a stop request; None if there was no request."""
    return max(0.0, _requested_at + GRACE_PERIOD - 1.0 - time.monotonic()) if _cause else None


def _find_supervisors() -> dict[psutil.Process, str]:
    """The processes without which this one must not go on: the `dvc` command that runs this stage,
    and the launcher of torchrun that runs several processes of it."""
    found = {}
    with contextlib.suppress(psutil.Error):
        parents = psutil.Process().parents()
        if "TORCHELASTIC_RUN_ID" in os.environ and parents:
            found[parents[0]] = "the launcher"
        if "DVC_STAGE" in os.environ:
            for process in parents:
                if any(Path(word).name == "dvc" for word in process.cmdline()):
                    return found | {process: "dvc"}
    return found


_supervisors = _find_supervisors()  # at import: they may be killed while PyTorch is imported


def name(number: int) -> str:
    """How to name a signal: by the keys that send it, or as SIGTERM, or by its number."""
    names = {int(each): each.name for each in signal.Signals}
    return _KEYS.get(number) or names.get(number) or f"signal {number}"


def _stop_after(process: psutil.Process, description: str, number: int) -> None:
    """Wait for a process to exit, then send this process a signal that it handles."""
    global _ended
    with contextlib.suppress(psutil.NoSuchProcess):
        while process.is_running() and process.status() != psutil.STATUS_ZOMBIE:
            time.sleep(1)
    _ended = description
    os.kill(os.getpid(), number)


def _exit_now(report: Callable[[str], None]) -> None:
    report(f"stopped by {_cause}; run the same command again to resume from the last checkpoint")
    os._exit(_status)
