"""The learning rate, update by update."""

import math

import pytest

from folio.training import schedule


def rates(peak=1.0, floor=0.1, warmup_steps=4, steps=13):
    return [schedule.learning_rate(n, peak, floor, warmup_steps, steps) for n in range(steps)]


def test_warmup_is_linear_and_ends_at_peak():
    assert rates()[:4] == [0.25, 0.5, 0.75, 1.0]


def test_decay_is_a_cosine():
    found = rates()
    assert found[4] == 1.0
    assert found[6] == pytest.approx(0.55 + 0.45 * math.sqrt(0.5))
    assert found[8] == pytest.approx(0.55)  # half-way
    assert found[10] == pytest.approx(0.55 - 0.45 * math.sqrt(0.5))
    assert found[4:] == sorted(found[4:], reverse=True)


@pytest.mark.parametrize("steps", [13, 600, 100_000])
def test_last_update_has_exactly_the_floor(steps):
    assert schedule.learning_rate(steps - 1, 2e-3, 1e-4, 4, steps) == 1e-4
    assert schedule.learning_rate(steps - 2, 2e-3, 1e-4, 4, steps) > 1e-4


def test_rate_stays_at_floor_beyond_last_update():
    assert schedule.learning_rate(13, 1.0, 0.1, 4, 13) == 0.1
    assert schedule.learning_rate(1_000_000, 1.0, 0.1, 4, 13) == 0.1


def test_rate_starts_at_peak_without_warmup():
    assert rates(warmup_steps=0)[0] == 1.0
    assert rates(warmup_steps=0, steps=1) == [1.0]


def test_warmup_longer_than_training_never_reaches_peak():
    assert rates(warmup_steps=8, steps=4) == [0.125, 0.25, 0.375, 0.5]
