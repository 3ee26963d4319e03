"""Encodes the tasks of a corpus in several processes.

Threads would wait for one another: tiktoken's regex engine and Python hold locks. The processes
write segments into a folder, so they exchange nothing but numbers.
"""

import contextlib
import json
import os
import selectors
import subprocess
import sys
from pathlib import Path
from typing import Any

from tqdm import tqdm

import folio
from folio import progress, signals
from folio.corpus import encoding, segments
from folio.corpus.segments import Plan
from folio.errors import UserError


def encode(plan: Plan, folder: Path, hide_progress: bool | None) -> None:
    """Write the segments of all tasks that the folder does not have yet.

    A bar counts the bytes of the files; hide_progress: see RuntimeParams. Raises UserError if the
    text is not valid, OSError if the disk is full, and Stopped.
    """
    weights = [sum(part.weight for part in task) for task in plan.tasks]
    done = segments.completed(folder)
    pending = [task for task in range(len(plan.tasks)) if task not in done]
    read = int(sum(weights[task] for task in done))
    count = min(available_cores(), len(pending))
    hide = hide_progress if plan.corpus.size else True  # a named corpus takes a second
    try:
        with progress.bar(plan.corpus.size, "encoding", "bytes", hide, read) as bar:
            if count > 1:
                _Workers(plan, folder, bar, weights).run(pending, count)
            else:
                for task in pending:
                    with _Counting(bar, weights[task]) as counting:
                        encoding.encode(plan, task, folder, counting.add)
    except signals.Stopped:
        share = sum(weights[task] for task in segments.completed(folder)) / (sum(weights) or 1)
        raise signals.Stopped(
            f"{share:.0%} of the text is encoded; run the same command again to continue"
        ) from None


class _Counting:
    """Adds the bytes of one task to a bar, neither more nor less than its weight in the end."""

    def __init__(self, bar: tqdm, weight: float) -> None:
        self._bar, self._left = bar, weight

    def add(self, count: float) -> None:
        count = min(count, self._left)
        self._left -= count
        self._bar.update(count)

    def __enter__(self) -> "_Counting":
        return self

    def __exit__(self, *_: object) -> None:
        self.add(self._left)


class _Workers:
    def __init__(self, plan: Plan, folder: Path, bar: tqdm, weights: list[float]) -> None:
        self._folder, self._bar, self._weights = folder, bar, weights
        plan.save(folder)

    def run(self, pending: list[int], count: int) -> None:
        """Encode the tasks in `count` processes."""
        left = iter(pending)
        with selectors.DefaultSelector() as selector:
            workers: list[_Worker] = []
            try:
                for _ in range(count):
                    workers.append(_Worker(self._folder))
                    selector.register(workers[-1].output, selectors.EVENT_READ, workers[-1])
                    self._start(workers[-1], next(left))
                while any(worker.counting for worker in workers):
                    for key, _ in selector.select(timeout=1):
                        worker = key.data
                        for message in worker.read():
                            if "read" in message:
                                worker.counting.add(message["read"])
                            elif "done" in message:
                                worker.counting.add(float("inf"))
                                worker.counting = None
                                if (task := next(left, None)) is not None:
                                    self._start(worker, task)
                            else:
                                _raise(message)
            finally:
                for worker in workers:
                    worker.kill()

    def _start(self, worker: "_Worker", task: int) -> None:
        worker.counting = _Counting(self._bar, self._weights[task])
        worker.start(task)


class _Worker:
    def __init__(self, folder: Path) -> None:
        # One thread for each process: NumPy's library for matrices would start more.
        threads = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1")
        library = str(Path(folio.__file__).parent.parent)
        path = os.pathsep.join(filter(None, [library, os.environ.get("PYTHONPATH")]))
        self._process = subprocess.Popen(
            [sys.executable, "-m", "folio.corpus.worker", str(folder.resolve())],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=os.environ | threads | {"PYTHONPATH": path},
        )
        assert self._process.stdin and self._process.stdout
        self._input, self.output = self._process.stdin, self._process.stdout
        self._rest = b""
        self.counting: _Counting | None = None  # of the current task

    def start(self, task: int) -> None:
        with contextlib.suppress(BrokenPipeError):  # it has ended; `read` says why
            self._input.write(f"{task}\n".encode())
            self._input.flush()

    def read(self) -> list[dict[str, Any]]:
        """Return the messages that have arrived. Raises UserError if the process has ended."""
        content = os.read(self.output.fileno(), 1 << 16)
        if not content:
            status = self._process.wait()
            how = f"was killed by signal {-status}" if status < 0 else f"failed (status {status})"
            raise UserError(
                f"a process that encodes the text {how}: free some memory if there was too little,"
                " and run the same command again to continue"
            )
        *lines, self._rest = (self._rest + content).split(b"\n")
        return [json.loads(line) for line in lines]

    def kill(self) -> None:
        self._process.kill()
        self._process.wait()
        for stream in (self._input, self.output):
            with contextlib.suppress(BrokenPipeError):
                stream.close()


def _raise(message: dict[str, Any]) -> None:
    """Raise what a worker has reported."""
    if "problem" in message:
        raise UserError(message["problem"])
    raise OSError(message["errno"], message["strerror"], message["file"])


def available_cores() -> int:
    """The number of CPU cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):  # Linux
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
