"""How much of the validation text also occurs in the training text."""

from concurrent.futures import ThreadPoolExecutor

import numpy as np

from folio.corpus.processes import available_cores
from folio.progress import Track, untracked

PASSAGE = 64  # tokens; texts of one author rarely share so many in a row by chance
SAMPLE = 1 << 20  # validation tokens; of a longer text, only this many are looked for
_STRETCHES = 64  # of consecutive tokens in the sample
_CHUNK = 1 << 18  # training tokens whose passages are compared at once
_FACTOR = 0x9E3779B97F4A7C15


def shared_fraction(train: np.ndarray, val: np.ndarray, track: Track = untracked) -> float:
    """Return the fraction of the validation tokens that are in passages of PASSAGE tokens that also
    occur in the training text, at any position.

    `train` and `val` are token ids, [N] and [M]. Passages are compared by a 64-bit hash. If M is
    greater than SAMPLE, the fraction is that of SAMPLE tokens in stretches all over the validation
    text, so the memory does not grow with M. The training text is searched on all cores.
    """
    stretches = _sample(val)
    hashes = np.concatenate([_passage_hashes(each) for each in stretches])
    if not len(hashes):
        return 0.0
    wanted, position = np.unique(hashes, return_inverse=True)
    found = _find(wanted, train, track)[position]
    shared, begin = 0, 0  # `begin`: the first passage of a stretch
    for stretch in stretches:
        count = max(0, len(stretch) - PASSAGE + 1)
        shared += _count_covered(found[begin : begin + count])
        begin += count
    return shared / sum(map(len, stretches))


def _sample(val: np.ndarray) -> list[np.ndarray]:
    if len(val) <= SAMPLE:
        return [val]
    length = SAMPLE // _STRETCHES
    starts = np.linspace(0, len(val) - length, _STRETCHES, dtype=np.int64)
    return [val[start : start + length] for start in starts]


def _find(wanted: np.ndarray, train: np.ndarray, track: Track) -> np.ndarray:
    """Return which of the sorted hashes are those of passages in the training text."""
    found = np.zeros(len(wanted), dtype=bool)
    # Most hashes are not in this table of their first bits, which is faster than a binary search.
    bits = min(26, (16 * len(wanted)).bit_length())
    shift = np.uint64(64 - bits)
    may_occur = np.zeros(1 << bits, dtype=bool)
    may_occur[wanted >> shift] = True

    def search(start: int) -> None:
        hashes = _passage_hashes(train[start : start + _CHUNK + PASSAGE - 1])
        hashes = hashes[may_occur[hashes >> shift]]
        index = np.searchsorted(wanted, hashes).clip(max=len(wanted) - 1)
        found[index[wanted[index] == hashes]] = True

    starts = range(0, len(train) - PASSAGE + 1, _CHUNK)
    pool = ThreadPoolExecutor(available_cores())  # NumPy releases the GIL
    try:
        results = pool.map(search, starts)
        for _ in track(starts, "repeated passages"):
            next(results)
    finally:
        pool.shutdown(cancel_futures=True)
    return found


def _count_covered(found: np.ndarray) -> int:
    """The number of tokens in passages that were found, given whether each passage was."""
    # A token is in such a passage if one begins there or at one of the tokens before it.
    begins = np.zeros(len(found) + PASSAGE, dtype=np.int64)
    starts = np.flatnonzero(found)
    begins[starts] += 1
    np.subtract.at(begins, starts + PASSAGE, 1)
    return int((begins.cumsum() > 0).sum())


def _passage_hashes(tokens: np.ndarray) -> np.ndarray:
    """Return the hash of the passage that begins at each of the [N] tokens, [N - PASSAGE + 1]."""
    if len(tokens) < PASSAGE:
        return np.empty(0, dtype=np.uint64)
    hashes = (tokens.astype(np.uint64) + np.uint64(1)) * np.uint64(_FACTOR)
    hashes ^= hashes >> np.uint64(29)
    length, factor = 1, _FACTOR
    while length < PASSAGE:  # the hash of two adjacent passages, from those of both
        hashes = hashes[:-length] * np.uint64(factor) + hashes[length:]
        length, factor = 2 * length, factor * factor % 2**64
    return hashes
