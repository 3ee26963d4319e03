"""What will be asked for next is read in threads."""

import gc
import threading
import time

import pytest

from folio.tokens.read_ahead import DEPTH, ReadAhead

DATA_PARALLEL = [(0, 8), (8, 8), (16, 4)]  # a rank's micro-batches; then it skips 20 windows


def calls(pattern, stride, steps, start=0):
    return [
        (start + step * stride + first, count) for step in range(steps) for first, count in pattern
    ]


@pytest.fixture
def reader():
    """A ReadAhead whose reads are recorded in its list `reads`."""

    def read(first, count):
        found.reads.append((first, count))
        return first, count

    found = ReadAhead(read)
    found.reads = []
    yield found
    found.close()


def wait_until(condition):
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.001)


@pytest.mark.parametrize(
    ("pattern", "stride"),
    [([(0, 16)], 16), (DATA_PARALLEL, 40), ([(8 * n, 8) for n in range(40)], 1_000)],
)
def test_calls_return_what_is_read_and_later_ones_are_read_ahead(reader, pattern, stride):
    for request in calls(pattern, stride, 4):
        assert reader(*request) == request
    expected = calls(pattern, stride, 30)[4 * len(pattern) :]
    for number, request in enumerate(expected):
        ahead = set(expected[number : number + DEPTH])
        wait_until(lambda ahead=ahead: set(reader.reads) >= ahead)
        assert reader(*request) == request
    assert all(reader.reads.count(request) == 1 for request in expected)


def test_jump_to_any_place_returns_what_is_read(reader):
    for start in (0, 7_000, 3, 3, 500):
        for request in calls(DATA_PARALLEL, 40, 5, start):
            assert reader(*request) == request


def test_error_in_a_thread_reaches_the_caller(reader):
    def read(first, count):
        if first == 160:
            raise OSError("the disk is gone")
        return first

    reader._read = read
    for first in range(0, 160, 16):
        assert reader(first, 16) == first
    with pytest.raises(OSError, match="the disk is gone"):
        reader(160, 16)
    assert reader(176, 16) == 176


def threads():
    return [each for each in threading.enumerate() if each.name.startswith("read ahead")]


def test_threads_stop_when_closed_and_when_no_longer_used():
    before = len(threads())
    for close in (True, False):
        reader = ReadAhead(lambda first, count: first)
        for first in range(0, 100, 10):
            reader(first, 10)
        assert len(threads()) > before
        if close:
            reader.close()
        del reader
        gc.collect()
        wait_until(lambda: len(threads()) == before)
