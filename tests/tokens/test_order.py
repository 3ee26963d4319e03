"""A random order without a table: a bijection without visible structure."""

import numpy as np
import pytest

from folio.tokens import order


def permuted(n, seed=0):
    return order.permute(np.arange(n), n, order.keys(np.random.default_rng(seed)))


@pytest.mark.parametrize("n", [*range(1, 40), 1_023, 1_024, 1_025, 99_991, 1 << 17])
def test_every_item_occurs_once(n):
    assert np.array_equal(np.sort(permuted(n)), np.arange(n))


def test_order_of_10_to_the_11_items_needs_no_table():
    n = 10**11
    positions = np.random.default_rng(1).integers(n, size=100_000)
    items = order.permute(positions, n, order.keys(np.random.default_rng(0)))
    assert items.dtype == np.int64 and items.min() >= 0 and items.max() < n
    assert len(np.unique(items)) == len(np.unique(positions))


def test_item_depends_only_on_position_and_keys():
    whole, keys = permuted(99_991), order.keys(np.random.default_rng(0))
    positions = np.array([5, 99_990, 0, 7, 5])
    assert order.permute(positions, 99_991, keys).tolist() == whole[positions].tolist()
    assert not np.array_equal(whole, permuted(99_991, seed=1))


def chi_square(values, bins, limit):
    """How far counts of values below `limit` are from equal ones, in standard deviations."""
    counts = np.bincount(values * bins // limit, minlength=bins)
    expected = len(values) / bins
    return (((counts - expected) ** 2 / expected).sum() - (bins - 1)) / np.sqrt(2 * bins)


@pytest.mark.parametrize("n", [1 << 20, 1_000_003, 3 * 10**6])
@pytest.mark.parametrize("seed", [0, 1])
def test_order_has_no_visible_structure(n, seed):
    items = permuted(n, seed)
    # The items of any stretch of positions are spread evenly; those of every k-th position, too.
    for part in (items[:50_000], items[n // 2 :][:50_000], items[:: n // 50_000][:50_000]):
        assert abs(chi_square(part, 100, n)) < 5
        assert abs(chi_square(part % 1009, 1009, 1009)) < 5
    # Neither neighbours nor items a row of the network apart depend on each other.
    for lag in (1, 2, 3, 7, 1_000, int(np.sqrt(n - 1)) + 1):
        assert abs(np.corrcoef(items[:-lag], items[lag:])[0, 1]) < 5 / np.sqrt(n)
        differences = (items[lag:] - items[:-lag]) % n
        assert abs(chi_square(differences, 1_000, n)) < 5
    # As many positions keep their neighbour as in a shuffled list: about one.
    assert np.count_nonzero(np.diff(items) == 1) < 10
    assert np.count_nonzero(items == np.arange(n)) < 10


def test_orders_of_different_keys_are_independent():
    one, two = permuted(1 << 20, 0), permuted(1 << 20, 1)
    assert abs(np.corrcoef(one, two)[0, 1]) < 5 / np.sqrt(1 << 20)
    assert abs(chi_square((one - two) % (1 << 20), 1_000, 1 << 20)) < 5
