"""Encodes a corpus to token ids, piece by piece, on all CPU cores."""

import os
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np

from folio.corpus.corpus import Corpus
from folio.tokens import tokenizer

SplitText = dict[str, str]  # a piece of the text: its "train" and "val" parts
SplitIds = dict[str, np.ndarray]  # the token ids of each part, [tokens] uint16


def encode_corpus(corpus: Corpus) -> Iterator[tuple[SplitText, SplitIds]]:
    """Yield the pieces of the text in order, each with its token ids.

    tiktoken releases the GIL, so threads can encode on all cores. Only a few pieces are queued at a
    time: enough to keep every core busy, but not the whole text, which may be larger than memory.
    """
    cores = _available_cores()
    # Build the encoding, and match each alternative of its pattern, in the main thread. The first
    # thread that uses tiktoken's regex engine writes, at each match, to memory that the others
    # read: if that were a worker, two workers would be no faster than one.
    tokenizer.encode("It's a text of 1 line.\n\n")
    pool = ThreadPoolExecutor(cores)
    queue: deque[tuple[SplitText, Future[SplitIds]]] = deque()
    try:
        for piece in split_pieces(corpus):
            queue.append((piece, pool.submit(_encode_parts, piece)))
            if len(queue) > 2 * cores:
                first, ids = queue.popleft()
                yield first, ids.result()
        for piece, ids in queue:
            yield piece, ids.result()
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


def split_pieces(corpus: Corpus) -> Iterator[SplitText]:
    """Yield the pieces of the text in order, each split into its training and validation parts."""
    remaining = corpus.train_characters
    for piece in tokenizer.pieces(corpus.chunks()):
        yield {"train": piece[:remaining], "val": piece[remaining:]}
        remaining = max(0, remaining - len(piece))


def _available_cores() -> int:
    """The number of CPU cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):  # Linux
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _encode_parts(piece: SplitText) -> SplitIds:
    return {part: tokenizer.encode(text) for part, text in piece.items()}
