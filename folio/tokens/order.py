"""A random order of n items that needs no table of n entries.

A keyed permutation: an alternating Feistel network on pairs (l, r), l < a and r < b, with a * b >=
n, and cycle walking where the result is n or more (J. Black and P. Rogaway, Ciphers with Arbitrary
Finite Domains, CT-RSA 2002). a * b exceeds n by less than a, so few items walk. The round function
is the finalizer of SplitMix64 (G. Steele, D. Lea and C. Flood, OOPSLA 2014).
"""

import math

import numpy as np

ROUNDS = 8


def keys(random: np.random.Generator) -> np.ndarray:
    """Draw the keys of a permutation, [ROUNDS] uint64."""
    return random.integers(1 << 64, size=ROUNDS, dtype=np.uint64)


def permute(positions: np.ndarray, n: int, keys: np.ndarray) -> np.ndarray:
    """Return the items at these positions of the order that `keys` define, as int64.

    positions: int64, each at least 0 and less than n. Of all n positions, each has another item.
    """
    a = math.isqrt(n - 1) + 1
    b = -(-n // a)
    items = _encipher(positions.astype(np.uint64), a, b, keys)
    while len(outside := np.flatnonzero(items >= n)):
        items[outside] = _encipher(items[outside], a, b, keys)
    return items.astype(np.int64)


def uniform(positions: np.ndarray, key: np.uint64) -> np.ndarray:
    """Return a random number for each position, at least 0 and less than 1: float64 [N].

    positions: int64, at least 0.
    """
    return (_mix(positions.astype(np.uint64), key) >> np.uint64(11)) * 2.0**-53


def _encipher(items: np.ndarray, a: int, b: int, keys: np.ndarray) -> np.ndarray:
    """A permutation of 0 to a * b - 1, on uint64."""
    left, right = np.divmod(items, np.uint64(b))
    for number, key in enumerate(keys):
        if number % 2:
            right = (right + _mix(left, key) % np.uint64(b)) % np.uint64(b)
        else:
            left = (left + _mix(right, key) % np.uint64(a)) % np.uint64(a)
    return left * np.uint64(b) + right


def _mix(values: np.ndarray, key: np.uint64) -> np.ndarray:
    """Hash uint64 to uint64, modulo 2^64."""
    mixed = values * np.uint64(0x9E3779B97F4A7C15) + key
    mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return mixed ^ (mixed >> np.uint64(31))
