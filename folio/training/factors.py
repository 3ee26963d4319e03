"""The factors of tokens: properties of their spelling that several tokens share.

GPT-2's vocabulary has separate tokens for `king`, ` king`, ` King` and ` KING`, and a small text
contains too few of each. In a factored model (Alexandrescu and Kirchhoff 2006, "Factored Neural
Language Models"), a token's vector depends on its word, on whether it is capitalised, and so on.
Here the factors of a token are its letters without case and leading space, and three flags: a
leading space, a capital, and capitals only.
"""

from collections import Counter

import numpy as np
import torch
from torch.nn import functional as F

from folio.tokens import tokenizer
from folio.tokens.vocabulary import Vocabulary

_FLAGS = 3


class Factors:
    """The factors of each row of the token embedding, [V, C].

    A row with n factors takes part in each with the weight 1 / sqrt(n).
    """

    def __init__(self, vocabulary: Vocabulary):
        words, flags = _factors(vocabulary)
        shared = [word for word, n in Counter(words).items() if word and n > 1]
        number = {word: i for i, word in enumerate(shared)}
        self.count = len(shared) + _FLAGS
        # The row's word; len(shared) if no other row has it.
        word = np.array([number.get(word, len(shared)) for word in words])
        factors = flags.sum(1) + (word < len(shared))
        weight = 1 / np.sqrt(np.maximum(1, factors))
        rows = np.argsort(word, kind="stable")[: int((word < len(shared)).sum())]
        self._word, self._rows = torch.from_numpy(word), torch.from_numpy(rows)
        self._starts = torch.from_numpy(np.searchsorted(word[rows], np.arange(len(shared))))
        self._flags = torch.from_numpy(flags).float()
        self._weight = torch.from_numpy(weight).float()[:, None]

    def to(self, device: torch.device) -> "Factors":
        for name in ("_word", "_rows", "_starts", "_flags", "_weight"):
            setattr(self, name, getattr(self, name).to(device))
        return self

    def sum(self, values: torch.Tensor) -> torch.Tensor:
        """Add up the rows of values [V, C] for each factor, in a fixed order: [count, C]."""
        weighted = values * self._weight
        words = F.embedding_bag(self._rows, weighted, self._starts, mode="sum")
        return torch.cat([words, self._flags.T @ weighted])

    def spread(self, values: torch.Tensor) -> torch.Tensor:
        """Add up the factors' values [count, C] for each row: [V, C]. The transpose of `sum`."""
        words = torch.cat([values[:-_FLAGS], values.new_zeros(1, values.shape[1])])
        return (words[self._word] + self._flags @ values[-_FLAGS:]) * self._weight


def _factors(vocabulary: Vocabulary) -> tuple[list[str], np.ndarray]:
    """The word of each row, and flags [V, 3]. A row that several tokens share has neither."""
    words = [""] * vocabulary.rows
    flags = np.zeros((vocabulary.rows, _FLAGS))
    multiplicity = vocabulary.multiplicity
    for token, row in enumerate(vocabulary.row.tolist()):
        if multiplicity is not None and multiplicity[row] > 1:
            continue
        text = tokenizer.token_bytes(token).decode(errors="backslashreplace")
        word = text.removeprefix(" ")
        words[row] = word.lower()
        flags[row] = text.startswith(" "), word.istitle(), len(word) > 1 and word.isupper()
    return words, flags
