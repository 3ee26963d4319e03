"""How the windows of a step are divided among processes and into micro-batches."""

import contextlib

from folio.distributed import Group
from folio.errors import UserError
from folio.training.params import TrainParams, micro_batches_each

_MIN_TOKENS = 4_096  # in a step of a process; with fewer, several processes are not faster


def useful_processes(p: TrainParams, block_size: int) -> int:
    """How many processes can share a step, with enough work for each of them."""
    return largest_number(p, max(1, p.windows * block_size // _MIN_TOKENS))


def largest_number(p: TrainParams, most: int) -> int:
    """The largest number of processes, up to `most`, that can train together."""
    for count in range(most, 1, -1):
        with contextlib.suppress(UserError):
            p.check_processes(count)
            return count
    return 1


def micro_batches(windows: int, batch_size: int, group: Group) -> list[tuple[int, int]]:
    """The micro-batches of this process, each as (its first window, number of windows).

    The windows of a step, numbered from 0, do not depend on the number of processes. A process
    takes consecutive ones, in micro-batches of at most batch_size. All processes have the same
    number of micro-batches, and nearly the same number of windows: see check_processes.
    """
    first, share = _part(windows, group.count, group.rank)
    found, number = [], micro_batches_each(windows, batch_size, group.count)
    for index in range(number):
        start, count = _part(share, number, index)
        found.append((first + start, count))
    return found


def _part(total: int, parts: int, index: int) -> tuple[int, int]:
    """Start and length of one of the parts into which `total` is divided as evenly as possible."""
    start, end = total * index // parts, total * (index + 1) // parts
    return start, end - start
