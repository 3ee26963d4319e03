"""The corpus encoded to token ids, piece by piece, on all cores."""

import collections
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from folio.corpus.corpus import Corpus
from folio.tokens import tokenizer

Texts = dict[str, str]  # a piece of the text: what is for "train" and what for "val"
Ids = dict[str, np.ndarray]  # the token ids of each, [tokens] uint16


def encoded(source: Corpus) -> Iterator[tuple[Texts, Ids]]:
    """The pieces of the text in their order, with their token ids, encoded on all cores.

    tiktoken lets other threads run while it encodes. A few pieces wait for their turn, so that no
    core does, and no more: a text may be larger than the memory.
    """
    cores = _cores()
    # Builds the encoding, and uses all of its pattern, before the threads do: the regex engine's
    # first user writes, at each match, to memory that all others read. Were it one of two threads,
    # the two would be no faster than one.
    tokenizer.encode("It's a text of 1 line.\n\n")
    pool = ThreadPoolExecutor(cores)
    ahead = collections.deque()
    try:
        for texts in parts(source):
            ahead.append((texts, pool.submit(_encode, texts)))
            if len(ahead) > 2 * cores:
                texts, ids = ahead.popleft()
                yield texts, ids.result()
        for texts, ids in ahead:
            yield texts, ids.result()
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


def parts(source: Corpus) -> Iterator[Texts]:
    """The pieces of the text in their order: of each, what is for training and for validation."""
    train = source.train_characters  # that are still to come
    for piece in tokenizer.pieces(source.chunks()):
        yield {"train": piece[:train], "val": piece[train:]}
        train = max(0, train - len(piece))


def _cores() -> int:
    """How many cores this process may use."""
    if hasattr(os, "sched_getaffinity"):  # Linux
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _encode(texts: Texts) -> Ids:
    return {part: tokenizer.encode(text) for part, text in texts.items()}
