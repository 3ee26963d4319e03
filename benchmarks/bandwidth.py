"""The speed of the operations with which processes add up gradients and gather weights.

benchmarks.distributed prints it. Each process sends and receives, of a tensor of `size` bytes in
each of n processes, (n - 1) / n in an all-gather or a reduce-scatter, and twice that in an
all-reduce: https://github.com/NVIDIA/nccl-tests/blob/master/doc/PERFORMANCE.md
"""

from collections.abc import Callable
from statistics import median
from typing import Any

import torch
import torch.distributed as dist

from benchmarks.team import Team, seconds_per_call
from folio.distributed import Group

SIZES = [8, 1_000_000, 10_000_000, 100_000_000, 1_000_000_000]  # bytes


def bandwidth_task(group: Group, where: torch.device) -> Callable[..., Any]:
    """A process that measures operations of NCCL, or on a CPU of gloo."""

    def answer(operation: str, size: int) -> float:
        whole = torch.zeros(max(group.count, size // 4), device=where)
        whole = whole[: len(whole) // group.count * group.count]
        part = torch.zeros(len(whole) // group.count, device=where)
        call = {
            "all-reduce": lambda: dist.all_reduce(whole),
            "all-gather": lambda: dist.all_gather_into_tensor(whole, part),
            "reduce-scatter": lambda: dist.reduce_scatter_tensor(part, whole),
        }[operation]
        seconds_per_call(call, 3, group, where)
        once = max(group.gather(seconds_per_call(call, 3, group, where)))
        calls = max(3, min(200, int(0.3 / once)))
        return median(seconds_per_call(call, calls, group, where) for _ in range(3))

    return answer


def measure_bandwidth(processes: int, most: int) -> None:
    """Print a table for sizes of up to `most` bytes."""
    operations = ("all-reduce", "all-gather", "reduce-scatter")
    print(f"\nCommunication of {processes} processes; GB/s that each process sends and receives")
    print("        bytes" + "".join(f"{name:>18}" for name in operations))
    print(" " * 13 + 3 * "       ms     GB/s")
    with Team(processes, bandwidth_task) as team:
        for size in (n for n in SIZES if n <= most):
            line = f"{size:13,}"
            for operation in operations:
                seconds = max(team.ask(operation, size))
                sent = size * (processes - 1) / processes * (2 if operation == "all-reduce" else 1)
                line += f"{1000 * seconds:9.3f}{sent / seconds / 1e9:9.2f}"
            print(line, flush=True)
