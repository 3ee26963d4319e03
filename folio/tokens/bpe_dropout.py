"""BPE dropout: random segmentations of a text into GPT-2's tokens.

I. Provilkov, D. Emelianenko and E. Voita, BPE-Dropout: Simple and Effective Subword Regularization,
ACL 2020, algorithm 1. A word begins as bytes. In each step, every merge that is possible in it is
dropped with a certain probability, independently of what was dropped before, and the first of the
others in the order of the merge table is made. A step in which none is left ends the word.

A draw costs some microseconds, so a word that occurs often is not drawn for each occurrence, but
has a pool of draws, from which each occurrence gets a random one.
"""

import codecs
import functools
import hashlib
import itertools
import operator
from collections.abc import Iterator

import numpy as np
import regex

from folio.progress import Track, untracked
from folio.tokens import tokenizer

_SEED = 1910_13267  # the paper on arXiv; any other number would do
_LONGEST = 128  # bytes; a longer word, such as a line of dashes, is always segmented as usual
_POOL = 16  # draws in the pool of a word, for each of its occurrences in a batch of words ...
_LARGEST_POOL = 1024  # ... and at most
_WORDS = 1 << 18  # in a batch, roughly
_KEPT = 1 << 23  # draws that are kept for the next batches
_CHUNK = 1 << 18  # tokens that are decoded at once
_SPLIT = regex.compile(tokenizer.PATTERN)
_END_OF_TEXT = tokenizer.VOCAB_SIZE - 1
Ids = tuple[int, ...]


def segment(
    tokens: np.ndarray, count: int, dropout: float, track: Track[int] = untracked
) -> Iterator[list[np.ndarray]]:
    """Yield `count` random segmentations of the text of some tokens, in pieces: for each piece of
    the text, its token ids in each segmentation, [tokens] uint16.

    `tokens`, [N], are GPT-2's; an end-of-text token remains one. dropout: the probability that a
    merge is dropped, at least 0 and less than 1; with 0, all segmentations are equal to `tokens`.
    Segmentation number i depends only on the text, i and the dropout. Memory use does not grow with
    the text.
    """
    pools = _Pools(dropout)
    random = [np.random.default_rng([_SEED, number]) for number in range(count)]
    for words in _batches(tokens, track):
        numbers: dict[str, int] = {}
        word_at = np.array([numbers.setdefault(word, len(numbers)) for word in words])
        occurrences = np.bincount(word_at).tolist()
        found = [pools.get(*each) for each in zip(numbers, occurrences, strict=True)]
        table = _Table(found)
        yield [table.ids(word_at, each.random(len(word_at))) for each in random]


class _Pools:
    """The pools of words: of each word, draws from the same random numbers whenever it occurs."""

    def __init__(self, dropout: float) -> None:
        # The probability that the first n merges are all dropped, for n = 1, 2, ...; in ascending
        # order. It is multiplied, since powers may be rounded differently on other machines.
        powers = np.multiply.accumulate(np.full(_LONGEST, dropout))
        self._all_dropped = powers[::-1].copy()
        self._pools: dict[str, list[Ids]] = {}
        self._kept = 0  # draws in them

    def get(self, word: str, occurrences: int) -> list[Ids]:
        """The segmentations of a word: as many draws as it needs."""
        size = min(_POOL * occurrences, _LARGEST_POOL)
        pool = self._pools.get(word, [])
        if len(pool) < size:
            if self._kept >= _KEPT:
                self._pools.clear()
                self._kept = 0
            self._kept += size
            pool = self._pools[word] = self._draw(word, size)
        return pool[:size]

    def _draw(self, word: str, size: int) -> list[Ids]:
        content = word.encode()
        if word == tokenizer.END_OF_TEXT:  # in the text itself, it is several words
            return [(_END_OF_TEXT,)] * size
        if len(content) > _LONGEST:
            return [tuple(tokenizer.encode(word).tolist())] * size
        state = _State(tuple(_byte_ids()[byte] for byte in content))
        known = {state.ids: state}
        random = np.random.default_rng([_SEED, *hashlib.sha256(content).digest()])
        steps = random.random((size, len(content) - 1))  # a word of n bytes has fewer than n merges
        dropped = _LONGEST - np.searchsorted(self._all_dropped, steps, side="right")
        return [_walk(state, each, known) for each in dropped.tolist()]


class _State:
    """A word after some merges, and the words after one more, in the order of the merge table."""

    def __init__(self, ids: Ids) -> None:
        self.ids = ids
        merges = _merges()
        pairs = enumerate(itertools.pairwise(ids))
        self.possible = sorted((merges[pair], at) for at, pair in pairs if pair in merges)
        self.following: list[_State | None] = [None] * len(self.possible)


def _walk(state: _State, dropped: list[int], known: dict[Ids, _State]) -> Ids:
    """Merge until all possible merges are dropped, and return the result.

    dropped: for each step, how many merges are dropped before the first that is not. known: the
    states of this word; most walks meet the same few.
    """
    for number in dropped:
        if number >= len(state.following):
            break
        following = state.following[number]
        if following is None:
            merged, at = state.possible[number]
            ids = (*state.ids[:at], merged, *state.ids[at + 2 :])
            following = known.get(ids) or known.setdefault(ids, _State(ids))
            state.following[number] = following
        state = following
    return state.ids


class _Table:
    """The pools of the words in a batch, as arrays."""

    def __init__(self, pools: list[list[Ids]]) -> None:
        self._size = np.array([len(pool) for pool in pools])  # [words]
        self._first = self._size.cumsum() - self._size  # the first draw of each word, [words]
        numbers: dict[Ids, int] = {}
        draws = itertools.chain.from_iterable(pools)
        # For each draw, the number of its segmentation, [draws].
        self._drawn = np.array([numbers.setdefault(ids, len(numbers)) for ids in draws])
        self._tokens = np.array([*itertools.chain.from_iterable(numbers)], dtype=np.uint16)
        self._length = np.array([len(ids) for ids in numbers])  # of each segmentation
        self._start = self._length.cumsum() - self._length  # of each, in _tokens

    def ids(self, word_at: np.ndarray, random: np.ndarray) -> np.ndarray:
        """Return the tokens of a text. `word_at`, [N]: its words; `random`, [N]: from 0 to 1."""
        draw = self._first[word_at] + (random * self._size[word_at]).astype(np.int64)
        segmentation = self._drawn[draw]
        length = self._length[segmentation]
        shift = self._start[segmentation] - (length.cumsum() - length)
        return self._tokens[np.arange(length.sum()) + shift.repeat(length)]


def _batches(tokens: np.ndarray, track: Track[int]) -> Iterator[list[str]]:
    """Yield the words of a text, as GPT-2 splits it, and END_OF_TEXT after each document."""
    batch: list[str] = []
    for document, texts in itertools.groupby(_texts(tokens, track), operator.itemgetter(0)):
        if document:
            batch.append(tokenizer.END_OF_TEXT)
        for piece in tokenizer.pieces(text for _, text in texts):
            batch += _SPLIT.findall(piece)
            if len(batch) >= _WORDS:
                yield batch
                batch = []
    if batch:
        yield batch


def _texts(tokens: np.ndarray, track: Track[int]) -> Iterator[tuple[int, str]]:
    """Yield the text of some tokens, each piece with the number of end-of-text tokens before it."""
    document, decoder = 0, codecs.getincrementaldecoder("utf-8")()
    for at in track(range(0, len(tokens), _CHUNK), "BPE dropout"):
        chunk, start = tokens[at : at + _CHUNK], 0
        for end in [*np.flatnonzero(chunk == _END_OF_TEXT).tolist(), len(chunk)]:
            # A chunk may end within a character; the rest of it is in the next one.
            yield document, decoder.decode(tokenizer.decode_bytes(chunk[start:end]))
            document, start = document + 1, end + 1
        document -= 1  # the chunk may end within a document


@functools.cache
def _merges() -> dict[tuple[int, int], int]:
    return tokenizer.merges()


@functools.cache
def _byte_ids() -> list[int]:
    return tokenizer.byte_ids()
