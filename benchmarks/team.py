"""Processes on this machine that measure something together, each on a GPU of its own."""

import gc
import multiprocessing
import os
import socket
import time
import warnings
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

import torch

from folio import device, distributed
from folio.distributed import Group

# Called in each process; returns the function that answers questions.
Task = Callable[[Group, torch.device], Callable[..., Any]]
OUT_OF_MEMORY = "out of memory"


class TeamError(Exception):
    """A process failed, ran out of memory or did not answer in time."""


class Team:
    """`count` processes that run the same task, as torchrun would start them.

    Without a GPU, they share the cores and communicate through gloo. A context manager: at the end
    of the block, the processes end, whatever they are doing.
    """

    def __init__(self, count: int, task: Task, seconds: float = 300):
        """Starts the processes. seconds: how long the task may take until it can answer."""
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        context = multiprocessing.get_context("spawn")
        self._pipes, self._processes = [], []
        for rank in range(count):
            ours, theirs = context.Pipe()
            arguments = (task, rank, count, port, theirs)
            self._processes.append(context.Process(target=_work, args=arguments, daemon=True))
            self._processes[-1].start()
            theirs.close()
            self._pipes.append(ours)
        try:
            self._answers(seconds)
        except BaseException:
            self._kill()
            raise

    def __enter__(self) -> "Team":
        return self

    def __exit__(self, *_: object) -> None:
        for pipe in self._pipes:
            if not pipe.closed:
                pipe.send(None)
        for process in self._processes:
            process.join(10)
        self._kill()

    def ask(self, *question: Any, seconds: float = 300) -> list[Any]:
        """The answer of each process. Raises TeamError, after ending all of them."""
        for pipe in self._pipes:
            pipe.send(question)
        try:
            return self._answers(seconds)
        except BaseException:
            self._kill()
            raise

    def _answers(self, seconds: float) -> list[Any]:
        deadline = time.monotonic() + seconds
        answers: dict[int, Any] = {}
        while len(answers) < len(self._pipes):
            for rank, pipe in enumerate(self._pipes):
                if rank in answers or not pipe.poll(0.01):
                    continue
                try:
                    answers[rank], problem = pipe.recv()
                except EOFError:
                    problem = f"process {rank} ended"
                if problem:
                    raise TeamError(problem)
            if time.monotonic() > deadline:
                raise TeamError(f"no answer after {seconds:.0f} s")
        return [answers[rank] for rank in sorted(answers)]

    def _kill(self) -> None:
        for process in self._processes:
            process.kill()
            process.join()
        for pipe in self._pipes:
            pipe.close()


def _work(task: Task, rank: int, count: int, port: int, pipe: Connection) -> None:
    """Run in a process: answer questions until there is none."""
    if count > 1:
        address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "GLOO_SOCKET_IFNAME": "lo"}
        ranks = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(count)}
        os.environ.update(address | ranks)
    torch.set_float32_matmul_precision("high")
    warnings.simplefilter("ignore", FutureWarning)  # names of operations that PyTorch has changed
    try:
        where = device.resolve_device("auto")
        if where.type == "cpu":
            torch.set_num_threads(max(1, torch.get_num_threads() // count))
        group = distributed.join(where.type)
        answer = task(group, group.device(where))
        pipe.send((None, None))
        while question := pipe.recv():
            pipe.send((answer(*question), None))
    except Exception as error:
        name, text = type(error).__name__, str(error)
        is_memory = any(words in name + text for words in ("OutOfMemory", "out of memory", "ALLOC"))
        pipe.send((None, OUT_OF_MEMORY if is_memory else f"process {rank}: {name}: {text[:300]}"))
    os._exit(0)  # the communicator need not be taken down, for which processes wait for each other


def seconds_per_call(
    work: Callable[[], object], calls: int, group: Group, where: torch.device
) -> float:
    """How long a call of `work` takes on average, if all processes start together."""
    wait = torch.cuda.synchronize if where.type == "cuda" else lambda: None
    gc.collect()
    wait()
    group.gather(None)
    started = time.perf_counter()
    for _ in range(calls):
        work()
    wait()
    return (time.perf_counter() - started) / calls
