"""How much of the validation text also occurs in the training text."""

from collections.abc import Iterable, Iterator

import numpy as np

from folio.progress import Track, untracked

PASSAGE = 64  # tokens; texts of one author rarely share so many in a row by chance
_CHUNK = 1 << 22  # tokens whose passages are compared at once
_FACTOR = 0x9E3779B97F4A7C15


def shared_fraction(train: np.ndarray, val: np.ndarray, track: Track = untracked) -> float:
    """Return the fraction of the validation tokens that are in passages of PASSAGE tokens that also
    occur in the training text, at any position.

    `train` and `val` are token ids, [N] and [M]. Passages are compared by a 64-bit hash.
    """
    hashes = np.concatenate([*_passage_hashes(val, _chunks(val)), np.empty(0, np.uint64)])
    if not len(hashes):
        return 0.0
    wanted, position = np.unique(hashes, return_inverse=True)
    found = np.zeros(len(wanted), dtype=bool)
    for chunk in _passage_hashes(train, track(_chunks(train), "repeated passages")):
        index = np.searchsorted(wanted, chunk).clip(max=len(wanted) - 1)
        found[index[wanted[index] == chunk]] = True
    # A token is in a shared passage if one begins there or at one of the tokens before it.
    begins = np.zeros(len(val) + 1, dtype=np.int64)
    starts = np.flatnonzero(found[position])
    begins[starts] += 1
    np.subtract.at(begins, starts + PASSAGE, 1)
    return float((begins.cumsum()[:-1] > 0).mean())


def _chunks(tokens: np.ndarray) -> range:
    return range(0, len(tokens) - PASSAGE + 1, _CHUNK)


def _passage_hashes(tokens: np.ndarray, starts: Iterable[int]) -> Iterator[np.ndarray]:
    """Yield the hashes of the passages that begin at each token, in chunks with these starts."""
    for start in starts:
        piece = tokens[start : start + _CHUNK + PASSAGE - 1].astype(np.uint64)
        hashes = (piece + np.uint64(1)) * np.uint64(_FACTOR)
        hashes ^= hashes >> np.uint64(29)
        length, factor = 1, _FACTOR
        while length < PASSAGE:  # the hash of two adjacent passages, from those of both
            hashes = hashes[:-length] * np.uint64(factor) + hashes[length:]
            length, factor = 2 * length, factor * factor % 2**64
        yield hashes
