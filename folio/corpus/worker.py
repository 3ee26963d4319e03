"""A process that encodes tasks: `python -m folio.corpus.worker FOLDER`, started by processes.py.

Reads the numbers of the tasks from stdin, a line each, and writes lines of JSON to stdout:
{"read": bytes} now and then, {"done": task} after a task, or {"problem": what the user has to fix}.
It exits when stdin ends, so it does not outlive the process that started it.
"""

import errno
import gc
import json
import os
import queue
import signal
import sys
import threading
import time
from pathlib import Path
from typing import Any

from folio import signals
from folio.corpus import encoding, segments
from folio.errors import UserError

_INTERVAL = 0.2  # seconds between reports


def main() -> None:
    gc.enable()  # see folio/__init__.py
    for number in signals.STOPPING:  # the process that started this one decides when to stop
        signal.signal(number, signal.SIG_IGN)
    folder = Path(sys.argv[1])
    tasks: queue.Queue[int] = queue.Queue()
    threading.Thread(target=_read_tasks, args=[tasks], daemon=True).start()
    plan = segments.Plan.load(folder)
    while True:
        task = tasks.get()
        try:
            encoding.encode(plan, task, folder, Reporter())
        except UserError as error:
            _write({"problem": str(error)})
        except OSError as error:
            if error.errno == errno.EPIPE:
                os._exit(0)
            _write({"errno": error.errno, "strerror": error.strerror, "file": error.filename})
        else:
            _write({"done": task})


class Reporter:
    """Adds up the bytes that were read, and reports them now and then."""

    def __init__(self) -> None:
        self._read, self._reported = 0.0, time.monotonic()

    def __call__(self, count: float) -> None:
        self._read += count
        if time.monotonic() - self._reported > _INTERVAL:
            _write({"read": self._read})
            self._read, self._reported = 0.0, time.monotonic()


def _read_tasks(tasks: "queue.Queue[int]") -> None:
    for line in sys.stdin:
        tasks.put(int(line))
    os._exit(0)


def _write(message: dict[str, Any]) -> None:
    print(json.dumps(message), flush=True)


if __name__ == "__main__":
    main()
