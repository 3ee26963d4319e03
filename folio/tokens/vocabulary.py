"""Which row of the token embedding each token of the vocabulary uses.

A small corpus holds a fraction of GPT-2's 50,257 tokens (tinyshakespeare 11,706), yet a small
model's head spends nearly all of a training step on them. What a token that never occurs can learn
is the same for all of them: to be unlikely. So one row may stand for all of those, counted in the
softmax as many times as it stands for tokens: the loss is exactly that of a GPT-2 in which these
rows are equal, and huggingface.save writes them out.
"""

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Vocabulary:
    row: np.ndarray  # [vocabulary size] uint16: the row of each token
    rows: int
    multiplicity: np.ndarray | None  # [rows] int64: the tokens a row stands for; None: 1 each

    def rows_of(self, tokens: np.ndarray) -> np.ndarray:
        """Token ids [N] to row numbers [N] uint16; the very array where they are the same."""
        return tokens if self.multiplicity is None else self.row[tokens]


def full_vocabulary(size: int) -> Vocabulary:
    """A row for each token."""
    return Vocabulary(np.arange(size, dtype=np.uint16), size, None)


def tied_vocabulary(tokens: np.ndarray, size: int) -> Vocabulary:
    """A row for each token that occurs in tokens, and one, the last, for all others."""
    occurs = np.bincount(tokens, minlength=size) > 0
    known = int(occurs.sum())
    if known == size:
        return full_vocabulary(size)
    row = np.full(size, known, dtype=np.uint16)
    row[occurs] = np.arange(known)
    multiplicity = np.append(np.ones(known, dtype=np.int64), size - known)
    return Vocabulary(row, known + 1, multiplicity)
