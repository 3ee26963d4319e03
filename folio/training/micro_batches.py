"""How the windows of a step are divided among processes and into micro-batches."""

from folio.distributed import Group
from folio.errors import UserError
from folio.training.params import TrainParams

_MIN_TOKENS = 4_096  # in a step of a process; with fewer, several processes are not faster


def useful_processes(p: TrainParams, block_size: int) -> int:
    """How many processes can share a step, with enough work for each of them."""
    windows = p.batch_size * p.accumulation
    most = max(1, windows * block_size // _MIN_TOKENS)
    return next(n for n in range(most, 0, -1) if _can_share(windows, p.batch_size, n))


def micro_batches(windows: int, batch_size: int, group: Group) -> list[tuple[int, int]]:
    """The micro-batches of this process, each as (its first window, number of windows).

    The windows of a step, numbered from 0, do not depend on the number of processes. A process
    takes consecutive ones, in micro-batches of at most batch_size. All processes have the same
    number of micro-batches, and nearly the same number of windows. Raises UserError if there are
    too few windows.
    """
    if not _can_share(windows, batch_size, group.count):
        raise UserError(
            f"{group.count} processes cannot share the {windows} windows of a step"
            f" (train.batch_size x train.accumulation): make train.accumulation a multiple of"
            f" {group.count}, or start fewer processes"
        )
    first, share = _part(windows, group.count, group.rank)
    found, number = [], _number(windows, batch_size, group.count)
    for index in range(number):
        start, count = _part(share, number, index)
        found.append((first + start, count))
    return found


def _number(windows: int, batch_size: int, processes: int) -> int:
    """The number of micro-batches of each process."""
    largest_share = -(-windows // processes)
    return -(-largest_share // batch_size)


def _can_share(windows: int, batch_size: int, processes: int) -> bool:
    """Whether each process has at least one window for each micro-batch."""
    return windows // processes >= _number(windows, batch_size, processes)


def _part(total: int, parts: int, index: int) -> tuple[int, int]:
    """Start and length of one of the parts into which `total` is divided as evenly as possible."""
    start, end = total * index // parts, total * (index + 1) // parts
    return start, end - start
