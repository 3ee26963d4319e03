"""The end of the training text, if only a part of it is used: prepare.training_fraction."""

from collections.abc import Callable, Iterable, Iterator

import numpy as np

from folio.errors import UserError
from folio.tokens import tokenizer


def end_of(
    read: Callable[[], Iterator[np.ndarray]], counts: np.ndarray, fraction: float
) -> tuple[np.ndarray, Iterator[np.ndarray]]:
    """Divide a text before its last int(tokens * fraction) tokens or, if these begin within a
    character, up to 3 tokens later. Return how often each id occurs before that, [vocabulary]
    int64, and the ids after it.

    read: yields the token ids of the text, in pieces that begin with whole characters; it is called
    twice. counts: how often each id occurs, [vocabulary]. Raises UserError if the end has no text.
    """
    tokens = int(counts.sum())
    before = _count(read(), tokens - int(tokens * fraction))
    if not (counts - before)[:-1].any():  # at most the token that ends a document is left
        raise UserError(
            f"prepare.training_fraction {fraction} leaves none of {tokens:,} training tokens:"
            " choose a larger one, or use a longer text"
        )
    return before, _skip(read(), int(before.sum()))


def text_size(counts: np.ndarray) -> dict[str, int]:
    """The number of tokens, characters and bytes (in UTF-8) of a text, from the number of
    occurrences of each id in it, [vocabulary]. It begins and ends with whole characters."""
    characters = size = 0
    for token in np.flatnonzero(counts[:-1]).tolist():  # the last one ends a document
        content = tokenizer.token_bytes(token)
        characters += int(counts[token]) * sum(not _continues(byte) for byte in content)
        size += int(counts[token]) * len(content)
    return {"tokens": int(counts.sum()), "characters": characters, "bytes": size}


def _count(pieces: Iterable[np.ndarray], tokens: int) -> np.ndarray:
    """How often each id occurs in the first tokens, and those that complete a character."""
    counts = np.zeros(tokenizer.VOCAB_SIZE, dtype=np.int64)
    for ids in pieces:
        end = min(tokens, len(ids))
        while end < len(ids) and _is_within_character(ids[end]):
            end += 1
        counts += np.bincount(ids[:end], minlength=len(counts))
        tokens -= end
        if tokens <= 0:
            break
    return counts


def _skip(pieces: Iterable[np.ndarray], count: int) -> Iterator[np.ndarray]:
    for ids in pieces:
        if count < len(ids):
            yield ids[count:]
        count = max(0, count - len(ids))


def _is_within_character(token: int) -> bool:
    return token != tokenizer.VOCAB_SIZE - 1 and _continues(tokenizer.token_bytes(token)[0])


def _continues(byte: int) -> bool:
    """Whether a byte of UTF-8 continues a character."""
    return byte & 0xC0 == 0x80
