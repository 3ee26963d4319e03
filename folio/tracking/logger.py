"""Logs a training run to MLflow from another thread, without delaying training."""

import dataclasses
import sys
import threading
from functools import partial
from typing import Any, Self

from folio import signals
from folio.run import Record, Run
from folio.signals import Stopped

# Here, since the thread may still be importing store.py when the time to exit is over.
INCOMPLETE = "MLflow does not have all of this run yet: `python -m folio sync` sends the rest"


class NoLogger:
    """Logs nothing: the logger of a process that is not the main one."""

    def start(self) -> None: ...

    def send(self, history: list[dict[str, Any]]) -> None: ...

    def finish(self, run: Run) -> None: ...


class RunLogger:
    """An asynchronous MLflow logger.

    If the store or the network fails, the failure is reported once and no data is lost: the points
    stay in the history and are sent with the next ones. Leaving the `with` block waits until
    everything has been sent or MLflow has failed.
    """

    def __init__(self, uri: str | None, record: Record):
        self._uri = uri
        self._updated = threading.Event()
        self._latest: tuple[Run, str, str | None] = (Run(record=record), "RUNNING", None)
        self._closing = False
        self._failed = False  # whether the last attempt to send failed
        self._thread = threading.Thread(target=self._work, name="mlflow", daemon=True)

    def __enter__(self) -> Self:
        return self

    def start(self) -> None:
        """Create the run in the store, or reopen it; if that has begun before, do nothing.

        The thread then imports and executes much Python code, and the training loop waits for it
        again and again (the global interpreter lock): a first step took 0.4 s instead of 0.2 s.
        """
        if self._thread.ident is None:
            self._thread.start()
            self._updated.set()

    def send(self, history: list[dict[str, Any]]) -> None:
        """Send the rows of a history that are not yet in the store."""
        run = dataclasses.replace(self._latest[0], history=list(history))
        self._update(run, "RUNNING")

    def finish(self, run: Run) -> None:
        """Send the complete run and mark it as finished."""
        self._update(run, "FINISHED")

    def __exit__(self, kind: type | None, problem: BaseException | None, _: object) -> None:
        with signals.deferred():  # a stop request during the last update would leave it incomplete
            if problem:
                status = "KILLED" if isinstance(problem, Stopped) else "FAILED"
                self._update(self._latest[0], status, str(problem))
            self.start()
            self._closing = True  # after the last update, because the thread reads `_closing` first
            self._updated.set()
            while self._thread.is_alive() and signals.seconds_left() != 0:
                self._thread.join(0.1)
            if self._failed or self._thread.is_alive():
                print(INCOMPLETE, file=sys.stderr)
        if not problem:
            signals.check()

    def _update(self, run: Run, status: str, stopped: str | None = None) -> None:
        self._latest = (run, status, stopped)
        self._updated.set()
        self.start()

    def _work(self) -> None:
        from folio.tracking import store  # here, because importing SQLAlchemy takes 0.3 s
        from folio.tracking.writer import RunWriter

        writer, closing = None, False
        while not closing:
            self._updated.wait()
            self._updated.clear()
            closing = self._closing  # before `_latest`: a later update sets the event again
            run, status, stopped = self._latest
            try:
                writer = writer or RunWriter(store.Store(self._uri))
                store.reconnect(partial(writer.send, run, status, stopped))
                self._failed = False
            except Exception as problem:  # whatever a store, a network or a disk can raise
                if not self._failed:
                    store.warn(problem)
                self._failed = True
