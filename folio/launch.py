"""Starts several processes of a stage on this machine, with torchrun's engine.

If a process is killed, all of them are started again, and the stage resumes from its checkpoint.
"""

import logging
import os
import signal
import socket
import sys
import threading
from collections import Counter
from collections.abc import Callable

import psutil
import torch

from folio import gpus, signals
from folio.distributed import check_interface, is_started_by_launcher
from folio.errors import LAUNCHER, LOST_CONNECTION, UserError, report

_MOST_FAILURES = 6  # of the same process without any progress; then it is left out
# How a process ends that did not fail by itself: signals that do not request a stop.
_FATAL = {-number for number in range(1, signal.NSIG)} - {-number for number in signals.STOPPING}
_FATAL |= {-signal.SIGABRT}  # NCCL aborts a process that has lost another one
# How a process ends that torchrun's engine stops because another one has failed.
_STOPPED = {-signal.SIGTERM, 128 + signal.SIGTERM, LOST_CONNECTION}


def count_processes(requested: int | str, device_type: str, most: int) -> int:
    """The number of processes to start; 1: none, since this process does the work itself.

    requested: runtime.processes. Processes of torchrun or srun do the work themselves. most: the
    number that `auto` does not exceed.
    """
    if is_started_by_launcher():
        return 1
    available = torch.cuda.device_count() if device_type == "cuda" else 0
    if requested == "auto":
        return max(1, min(available, most))
    if device_type != "cpu":
        check_gpus(int(requested), max(1, available))
    return int(requested)


def check_gpus(processes: int, available: int | None = None) -> None:
    """Raise UserError if there are GPUs, but not one for each process.

    available: their number; by default, that of those that this process may use.
    """
    available = torch.cuda.device_count() if available is None else available
    if 0 < available < processes:
        raise UserError(
            f"runtime.processes: {processes} processes need as many GPUs, but this training has"
            f" {available}: set it to auto, or runtime.device to cpu"
        )


def run(
    module: str,
    count: int,
    device_type: str,
    progress: Callable[[], object],
    largest_number: Callable[[int], int],
) -> None:
    """Run `python -m module` in `count` processes. Exits with their status unless it is 0.

    progress: returns a value that changes whenever the work has got further. A process that is
    killed again and again without progress is left out in the end, for example if its GPU is
    defective. largest_number: how many processes, up to a number, can then share the work.
    """
    _set_environment(count, device_type)
    devices = gpus.visible() if device_type == "cuda" else [str(n) for n in range(count)]
    failures, before = Counter[int](), progress()  # of each process, without progress
    with signals.passed_on() as passed_on:
        while True:
            if device_type == "cuda":
                os.environ["CUDA_VISIBLE_DEVICES"] = ",".join(devices[:count])
            exit_codes = _run_once(module, count, passed_on)
            if not exit_codes:
                return
            rank, code = exit_codes[0]
            if passed_on.number or code not in (LOST_CONNECTION, *_FATAL):
                _exit(code, passed_on.number or -code)
            if (now := progress()) != before:
                failures, before = Counter(), now
            failures[rank] += 1
            killed = f"was killed by {signals.name(-code)}" if code < 0 else "lost a connection"
            line = f"process {rank} {killed}"
            if failures[rank] < _MOST_FAILURES:
                report(f"{line}: starting all {count} again from the last checkpoint")
            elif len(devices) > 1:
                del devices[rank]
                failures, left = Counter(), min(count, len(devices))
                count = largest_number(left)
                fewer = f", on {count} only: {left} cannot share a step" if count < left else ""
                report(f"{line} {_MOST_FAILURES} times: continuing without it{fewer}")
            else:
                report(f"{line} {_MOST_FAILURES} times; run the same command again to resume")
                sys.exit(1)


def _run_once(module: str, count: int, passed_on: signals.PassedOn) -> list[tuple[int, int]]:
    """Start the processes and wait for them. Returns (rank, exit code) of those that failed, in
    the order in which they did; [] if none has."""
    failed: list[tuple[int, int]] = []
    engine = threading.Thread(target=_run_engine, args=[module, count, failed], daemon=True)
    engine.start()  # in the main thread, it would replace the signal handlers
    while engine.is_alive():
        engine.join(0.1)
        passed_on.to(psutil.Process().children())
    return failed


def _run_engine(module: str, count: int, failed: list[tuple[int, int]]) -> None:
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=count,
        run_id=f"folio-{os.getpid()}",
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        local_addr="localhost",
        max_restarts=0,  # it would also restart after an error that will occur again
    )
    try:
        elastic_launch(config, sys.executable)("-m", module)
    except ChildFailedError as error:
        found = [
            (f.timestamp, f.exitcode in _STOPPED, r, f.exitcode) for r, f in error.failures.items()
        ]
        failed += [(rank, code) for *_, rank, code in sorted(found)]
    except Exception as error:
        report(f"torchrun's engine failed: {error}")
        failed.append((0, 1))


def _exit(code: int, stop: int) -> None:
    """Exit with the status of a process that has failed, or was stopped by a signal."""
    if code < 0:  # it was still starting, so it has not reported anything
        report(f"stopped by {signals.name(stop)}; run the same command again to continue")
    sys.exit(code if code > 0 else 128 + stop)


def _set_environment(count: int, device_type: str) -> None:
    """Set what the processes inherit, unless the user has set it."""
    os.environ[LAUNCHER] = "1"
    os.environ.setdefault("GLOO_SOCKET_IFNAME", _loopback_interface())
    check_interface()
    if device_type == "cpu":  # as many threads as cores, in all processes together
        os.environ.setdefault("OMP_NUM_THREADS", str(max(1, torch.get_num_threads() // count)))


def _loopback_interface() -> str:
    """The network interface that exists without a network: lo, or lo0."""
    for name, addresses in psutil.net_if_addrs().items():
        if any(a.family == socket.AF_INET and a.address == "127.0.0.1" for a in addresses):
            return name
    return "lo"
