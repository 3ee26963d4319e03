"""Reads in threads what will be asked for next."""

from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Generic, TypeVar

T = TypeVar("T")
Request = tuple[int, int]  # first, count

DEPTH = 8  # requests that are read ahead
_THREADS = 4  # more than one, for storage that answers slowly
_HISTORY = 1024  # requests; a pattern may be half as long


class ReadAhead(Generic[T]):
    """A function read(first, count), whose next calls are executed ahead in threads.

    A training process reads its share of each step in one or more micro-batches, and skips those of
    the other processes. So the calls follow a pattern: after some number of calls, both arguments
    repeat, except that `first` has moved on. What follows is read ahead once the pattern has
    occurred twice; any other call is read while the caller waits. The results are the same.
    """

    def __init__(self, read: Callable[[int, int], T], depth: int = DEPTH) -> None:
        self._read, self._depth = read, depth
        self._history: deque[Request] = deque(maxlen=_HISTORY)  # the latest calls
        self._period = 0  # number of calls after which the pattern repeats; 0: unknown
        self._ahead: deque[tuple[Request, Future[T]]] = deque()
        self._pool = ThreadPoolExecutor(_THREADS, "read ahead")

    def __call__(self, first: int, count: int) -> T:
        """Return read(first, count), or raise what it raised."""
        request = (first, count)
        if self._ahead and self._ahead[0][0] == request:
            _, found = self._ahead.popleft()
            self._history.append(request)
        else:
            self._drop()
            found = self._pool.submit(self._read, first, count)
            self._history.append(request)
            self._period = _find_period(self._history)
        if self._period:
            while len(self._ahead) < self._depth:
                expected = self._expected()
                self._ahead.append((expected, self._pool.submit(self._read, *expected)))
        return found.result()

    def close(self) -> None:
        """Stop the threads, after the reads that they are busy with."""
        self._drop()
        self._pool.shutdown()

    def _drop(self) -> None:
        for _, future in self._ahead:
            future.cancel()
        self._ahead.clear()

    def _expected(self) -> Request:
        """The call that follows those made and those expected so far."""
        calls = [
            *list(self._history)[-2 * self._period :],
            *(request for request, _ in self._ahead),
        ]
        shift = calls[-1][0] - calls[-1 - self._period][0]
        first, count = calls[-self._period]
        return first + shift, count


def _find_period(history: deque[Request]) -> int:
    """The smallest period of the calls, at most half their number; 0 if they have none."""
    calls = list(history)
    for period in range(1, len(calls) // 2 + 1):
        pairs = zip(calls, calls[period:], strict=False)
        changes = {(later[0] - first, later[1] - count) for (first, count), later in pairs}
        if len(changes) == 1 and changes.pop()[1] == 0:
            return period
    return 0
