"""MLflow kept up with a training while it runs, at no cost to it."""

import dataclasses
import sys
import threading
from typing import Any, Self

from folio import stopping, tracking
from folio.records import Record, Run
from folio.stopping import Stopped


class Follower:
    """Keeps MLflow up with a training, in a thread of its own: the training never waits for it.

    What fails in the store or on the way to it is said once and does no harm: points wait in the
    history and go with the next that get through. Leaving the block waits until all is sent, or
    MLflow has refused.
    """

    def __init__(self, address: str | None, record: Record):
        self._address = address
        self._news = threading.Event()
        self._latest: tuple[Run, str, str | None] = (Run(record=record), "RUNNING", None)
        self._over = False
        self._lacking = False  # the last that was tried did not get through
        self._thread = threading.Thread(target=self._work, name="mlflow", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        self._news.set()
        return self

    def follow(self, history: list[dict[str, Any]]) -> None:
        """Send the rows of a history that are not in the store yet."""
        run = dataclasses.replace(self._latest[0], history=list(history))
        self._tell(run, "RUNNING")

    def finish(self, run: Run) -> None:
        """Send all that there is to the run, and mark it finished when the block is left."""
        self._tell(run, "FINISHED")

    def __exit__(self, kind: type | None, problem: BaseException | None, _: object) -> None:
        stopped = isinstance(problem, Stopped)
        if problem:
            self._tell(self._latest[0], "KILLED" if stopped else "FAILED", str(problem))
        self._over = True  # after the last word, for the thread reads them in turn
        self._news.set()
        self._thread.join(stopping.seconds_left() if stopped else None)
        if self._lacking or self._thread.is_alive():
            print(tracking.LACKING, file=sys.stderr)

    def _tell(self, run: Run, status: str, stopped: str | None = None) -> None:
        self._latest = (run, status, stopped)
        self._news.set()

    def _work(self) -> None:
        store, sent, over = None, 0, False  # sent: rows that are in the store
        while not over:
            self._news.wait()
            self._news.clear()
            over = self._over  # before the latest is read: what is told later sets the news again
            run, status, stopped = self._latest
            try:
                store = store or tracking.Store(self._address)
                rest = dataclasses.replace(run, history=run.history[sent:])
                store.send(rest, status, stopped)
                sent, self._lacking = len(run.history), False
            except Exception as problem:  # whatever a store, a network or a disk can raise
                if not self._lacking:
                    tracking.complain(problem)
                self._lacking = True
