"""Which row of the token embedding each token of the vocabulary uses.

A small corpus contains only a fraction of GPT-2's 50,257 tokens (tinyshakespeare: 11,706), yet a
small model spends most of a training step on the output layer, whose cost grows with the number of
rows. All a model can learn about a token that never occurs is that it is unlikely, which is the
same for all such tokens. They can therefore share one row, which the softmax counts once for each
token that shares it. The loss is exactly that of a GPT-2 in which the rows of these tokens are
equal; huggingface.save writes a separate row for each token.
"""

from dataclasses import dataclass

import numpy as np

from folio.tokens.token_files import dtype_of


@dataclass(frozen=True)
class Vocabulary:
    row: np.ndarray  # [vocabulary size] uint16 or uint32: the row of each token
    rows: int  # number of rows
    multiplicity: np.ndarray | None  # [rows] int64: tokens that share each row; None: 1 for each

    def rows_of(self, tokens: np.ndarray) -> np.ndarray:
        """Return the row of each token id, [N]. Returns the same array, without a copy, if every
        token has its own row."""
        return tokens if self.multiplicity is None else self.row[tokens]


def full_vocabulary(size: int) -> Vocabulary:
    """Return a vocabulary in which each token has its own row."""
    return Vocabulary(np.arange(size, dtype=dtype_of(size)), size, None)


def tied_vocabulary(counts: np.ndarray) -> Vocabulary:
    """Return a vocabulary with a row for each id that occurs; all other ids share the last row.

    `counts`, [vocabulary size], is the number of occurrences of each id.
    """
    size, occurs = len(counts), counts > 0
    own_rows = int(occurs.sum())
    if own_rows == size:
        return full_vocabulary(size)
    row = np.full(size, own_rows, dtype=dtype_of(size))
    row[occurs] = np.arange(own_rows)
    multiplicity = np.append(np.ones(own_rows, dtype=np.int64), size - own_rows)
    return Vocabulary(row, own_rows + 1, multiplicity)
