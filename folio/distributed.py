"""The processes that train one model together, and what they have to agree on.

`torchrun` and `srun` describe each process in its environment. Every process runs the same program;
process 0, the main one, alone writes files, sends metrics to MLflow and prints.
"""

import contextlib
import datetime
import os
import subprocess
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, wait
from typing import Any, TypeVar

import psutil
import torch
import torch.distributed as dist

from folio import errors, signals
from folio.errors import UserError
from folio.progress import Track

T = TypeVar("T")
_FOREVER = datetime.timedelta(days=365)
_SECONDS_BEFORE_REPORT = 5.0  # of waiting for other processes to start


class Group:
    """All processes of a training run. By default, there is only this one.

    Methods marked as collective must be called by every process, in the same order.
    """

    def __init__(self, rank: int = 0, count: int = 1, local_rank: int = 0):
        """local_rank: the rank among the processes on this machine.

        With count > 1, torch.distributed must have been initialized.
        """
        self.rank, self.count, self.local_rank = rank, count, local_rank
        self._pending: tuple[Any, torch.Tensor] | None = None  # see check_stop
        if count > 1:
            self._host = dist.new_group(backend="gloo")  # for what is in the host's memory
            self._patient = dist.new_group(backend="gloo", timeout=_FOREVER)

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def device(self, device: torch.device) -> torch.device:
        """The device of this process: of several GPUs, the one of its local rank."""
        if self.count == 1 or device.type != "cuda":
            return device
        available = torch.cuda.device_count()
        if self.local_rank >= available:
            raise UserError(
                f"process {self.local_rank} on this machine has no GPU of its own, since there are"
                f" only {available}: start {available}, or set runtime.device to cpu"
            )
        torch.cuda.set_device(self.local_rank)
        return torch.device("cuda", self.local_rank)

    def sum_(self, tensor: torch.Tensor) -> torch.Tensor:
        """Replace the tensor by its sum over all processes, which is bitwise the same in each.

        Collective. On a GPU, the host does not wait for it.
        """
        if self.count > 1:
            dist.all_reduce(tensor, group=None if tensor.device.type == "cuda" else self._host)
        return tensor

    def gather(self, value: T) -> list[T]:
        """The value of each process, by rank. Collective."""
        if self.count == 1:
            return [value]
        found: list[Any] = [None] * self.count
        dist.all_gather_object(found, value, group=self._host)
        return found

    def from_main(self, value: T) -> T:
        """The value that the main process passes. Collective."""
        return self.gather(value)[0]

    def check_stop(self) -> None:
        """Raise Stopped in all processes at once if any of them was asked to stop. Collective.

        With several processes, a call answers for the requests before the previous call. By then
        the answer has arrived, so no process waits for another.
        """
        if self.count == 1:
            signals.check()
            return
        pending, self._pending = self._pending, None
        if pending:
            work, number = pending
            work.wait()
            if int(number):
                signals.request_elsewhere(int(number), errors.report)
                self.silence_others()
                raise signals.Stopped
        requested = torch.tensor(signals.requested())
        work = dist.all_reduce(requested, dist.ReduceOp.MAX, self._host, async_op=True)
        self._pending = work, requested

    def stoppable(self, track: Track[Any]) -> Track[Any]:
        """Let stop requests take effect between the items, in all processes; and if there is only
        one process, at any time. Collective."""

        def checked(items: Sequence[T], description: str) -> Iterator[T]:
            with signals.interruptible() if self.count == 1 else contextlib.nullcontext():
                for item in track(items, description):
                    self.check_stop()
                    yield item

        return checked

    @contextlib.contextmanager
    def agreeing(self) -> Iterator[None]:
        """If the block fails in one process, fail in all; only that one reports it. Collective."""
        problem: Exception | None = None
        try:
            yield
        except Exception as error:
            if self.count == 1:
                raise
            problem = error
        failed = [rank for rank, each in enumerate(self.gather(problem is not None)) if each]
        if problem and self.rank == failed[0]:
            raise problem
        if failed:
            errors.silence()
            raise UserError(f"process {failed[0]} has failed")

    @contextlib.contextmanager
    def main_holds(self, lock: contextlib.AbstractContextManager[None]) -> Iterator[None]:
        """Hold the lock in the main process; the others wait until it has it. Collective."""
        with lock if self.is_main else contextlib.nullcontext():
            if self.count > 1:
                dist.barrier(group=self._patient)
            yield

    def silence_others(self) -> None:
        """Let only the main process report what is raised next, in all processes."""
        if not self.is_main:
            errors.silence()

    def leave(self) -> None:
        """Wait for the other processes, before the program ends. Collective.

        Launchers stop all processes as soon as one has ended with an error.
        """
        if self.count > 1:
            if self._pending:
                self._pending[0].wait()
            dist.barrier(group=self._host)


ONE_PROCESS = Group()


def join(device_type: str) -> Group:
    """Join the processes that torchrun or srun has started with this one, if any.

    device_type: cuda, or cpu. Collective. If they do not come within a few seconds, reports who is
    awaited. Raises UserError if they cannot be reached.
    """
    found = _from_torchrun() or _from_srun()
    if not found or found[1] == 1:
        return Group()
    rank, count, local_rank = found
    os.environ["RANK"] = str(rank)  # srun has not set it
    _number("MASTER_PORT", 1, least=1, most=65_535)
    check_interface()
    address = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
    awaited = "process 0" if rank else _others(rank, count)

    def meet() -> Group:
        nonlocal awaited
        backend = "cpu:gloo,cuda:nccl" if device_type == "cuda" else "gloo"
        store, _, _ = next(dist.rendezvous("env://", rank, count))
        awaited = _others(rank, count)
        store = dist.PrefixStore(_attempt(count), store)
        dist.init_process_group(backend, store=store, rank=rank, world_size=count)
        return Group(rank, count, local_rank)

    meeting = _started(meet)  # it blocks in C code, where Python does not handle signals
    try:
        if not wait([meeting], _SECONDS_BEFORE_REPORT).done:
            errors.report(f"waiting for {awaited} at {address}")
        group = meeting.result()
    except signals.Stopped:
        if errors.LAUNCHER in os.environ:  # it reports the stop, once
            signals.end_process()
        raise
    except (RuntimeError, ValueError) as error:
        problem = str(error).splitlines()[0]
        raise UserError(
            f"process {rank} of {count} cannot reach the others at {address} ({problem}): check"
            " MASTER_ADDR and MASTER_PORT, or the rendezvous endpoint of torchrun, which needs"
            " TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 to restart processes on several machines"
        ) from None
    signals.exit_even_if_blocked(errors.report)
    return group


def _others(rank: int, count: int) -> str:
    return f"process {1 - rank}" if count == 2 else f"the other {count - 1} processes"


def _started(work: Callable[[], T]) -> Future[T]:
    """Start the work in a thread that does not keep the program from ending."""
    future: Future[T] = Future()

    def run() -> None:
        try:
            future.set_result(work())
        except Exception as error:
            future.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    return future


def _attempt(count: int) -> str:
    """A prefix for what the processes store, so that they do not read what was stored before they
    were restarted: torchrun 2.13 does not clear it.

    The number of restarts is the same in all processes only if they are on one machine.
    """
    on_one_machine = os.environ.get("LOCAL_WORLD_SIZE") == str(count)
    return os.environ.get("TORCHELASTIC_RESTART_COUNT", "") if on_one_machine else ""


def is_started_by_launcher() -> bool:
    """Whether torchrun, or srun with several tasks, has started this process."""
    return bool(_from_torchrun() or _is_task_of_srun())


def _from_torchrun() -> tuple[int, int, int] | None:
    """Rank, number of processes and local rank from the environment, if torchrun has set it."""
    if "RANK" not in os.environ or "WORLD_SIZE" not in os.environ:
        return None
    count = _number("WORLD_SIZE", least=1)
    rank = _number("RANK", most=count - 1)
    return rank, count, _number("LOCAL_RANK", rank)


def _from_srun() -> tuple[int, int, int] | None:
    """The same, if this process is one of several tasks of a step that srun has started.

    The environment of a batch script describes the job, not a step. The main process listens on the
    first of the step's machines, unless MASTER_ADDR names another one.
    """
    if not _is_task_of_srun():
        return None
    if "MASTER_ADDR" not in os.environ:
        command = ["scontrol", "show", "hostnames", os.environ.get("SLURM_STEP_NODELIST", "")]
        try:
            names = subprocess.run(command, capture_output=True, text=True, check=True).stdout
            os.environ["MASTER_ADDR"] = names.split()[0]
        except (OSError, IndexError, subprocess.SubprocessError):
            raise UserError(
                "scontrol does not list the machines of this step: set MASTER_ADDR to the first"
            ) from None
    job, step = _number("SLURM_JOB_ID"), _number("SLURM_STEP_ID")
    os.environ.setdefault("MASTER_PORT", str(20_000 + (100 * job + step) % 20_000))
    tasks, local_rank = _number("SLURM_STEP_NUM_TASKS", least=1), _number("SLURM_LOCALID")
    return _number("SLURM_PROCID", most=tasks - 1), tasks, local_rank


def _is_task_of_srun() -> bool:
    return _number("SLURM_STEP_NUM_TASKS", 1, least=1) > 1


def _number(name: str, default: int | None = None, least: int = 0, most: int | None = None) -> int:
    """The environment variable as a number. Raises UserError if it is none in the range."""
    text = os.environ.get(name, default)
    with contextlib.suppress(TypeError, ValueError):
        number = int(text)  # type: ignore[arg-type]
        if least <= number and (most is None or number <= most):
            return number
    allowed = f"of at least {least}" if most is None else f"from {least} to {most}"
    raise UserError(f"the environment variable {name} is {text!r}, not a number {allowed}")


def check_interface() -> None:
    """Raise UserError if gloo shall use a network interface that this machine does not have."""
    requested = os.environ.get("GLOO_SOCKET_IFNAME")
    known = psutil.net_if_addrs()
    if requested and not known.keys() >= set(filter(None, requested.split(","))):
        raise UserError(
            f"the environment variable GLOO_SOCKET_IFNAME is {requested!r}, but the network"
            f" interfaces of this machine are {', '.join(known)}: set it to one of them"
        )
