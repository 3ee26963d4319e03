"""Checkpoints take at most a tenth of the time; the throughput is that of the steps alone."""

import time

import pytest

from folio.training.timing import CheckpointPacing, Throughput


class Clock:
    def __init__(self, monkeypatch):
        self.now = 100.0
        for name in ("monotonic", "perf_counter"):
            monkeypatch.setattr(time, name, lambda: self.now)


@pytest.fixture
def clock(monkeypatch):
    return Clock(monkeypatch)


def checkpoint(pacing, clock, seconds):
    with pacing.measured():
        clock.now += seconds


def test_pacing_allows_first_evaluation_at_once(clock):
    pacing = CheckpointPacing(interval=300)
    assert pacing.is_due(evaluated=True) and not pacing.is_due(evaluated=False)


def test_pacing_waits_ten_times_the_cost_after_an_evaluation(clock):
    pacing = CheckpointPacing(interval=300)
    checkpoint(pacing, clock, seconds=1.2)
    clock.now += 9.9
    assert not pacing.is_due(evaluated=True)
    clock.now += 0.2
    assert pacing.is_due(evaluated=True) and not pacing.is_due(evaluated=False)


def test_pacing_does_not_wait_after_a_quick_checkpoint(clock):
    pacing = CheckpointPacing(interval=300)
    checkpoint(pacing, clock, seconds=0.1)
    assert pacing.is_due(evaluated=True)


def test_pacing_is_due_after_the_interval(clock):
    pacing = CheckpointPacing(interval=300)
    clock.now += 299
    assert not pacing.is_due(evaluated=False)
    clock.now += 1
    assert pacing.is_due(evaluated=False)


def test_throughput_counts_the_steps_since_restart(clock):
    throughput = Throughput(tokens_per_step=512, step=10)
    assert throughput.read(10) == {}
    clock.now += 2
    assert throughput.read(14) == {"tokens_per_second": 1024.0}
    throughput.restart(14)
    assert throughput.read(14) == {}
