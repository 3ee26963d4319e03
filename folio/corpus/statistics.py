"""What is in the corpus: counts, the commonest tokens, and two pictures.

All of it comes from running counts, as large for a long text as for a short one.
"""

import re
from collections import Counter
from collections.abc import Callable

import numpy as np
import pandas as pd


class CorpusStatistics:
    """Running counts of a text that comes in pieces.

    The pieces are to be cut as tokenizer.pieces does, before white space and after what is none.
    """

    def __init__(self, vocabulary: int) -> None:
        """`vocabulary` is how many token ids there are."""
        self.characters = 0
        self.start = ""  # the first 300 characters
        self.train = np.zeros(vocabulary, dtype=np.int64)  # times that each id occurs in training
        self.val = np.zeros(vocabulary, dtype=np.int64)
        self._lines: Counter[int] = Counter()  # by length; those that were seen to end
        self._speeches: Counter[int] = Counter()
        self._line = self._speech = 0  # the length so far of the last, which may go on

    def add(self, text: str, train: np.ndarray, val: np.ndarray) -> None:
        """Count a piece of the text, not empty, with its ids for training and validation."""
        self.characters += len(text)
        self.start += text[: 300 - len(self.start)]
        self.train += np.bincount(train, minlength=len(self.train))
        self.val += np.bincount(val, minlength=len(self.val))

        lines = text.splitlines()
        lengths = [0 if line.isspace() else len(line) for line in lines]
        if self._line:
            lengths[0] = self._line + len(lines[0])  # even where blanks are all that is added
        self._line = lengths.pop()
        self._lines.update(lengths)

        words = [len(speech.split()) for speech in re.split(r"\n\s*\n", text)]
        words[0] += self._speech
        self._speech = words.pop()
        self._speeches.update(words)

    @property
    def lines(self) -> Counter[int]:
        """How many lines there are of each length in characters; blank ones are left out."""
        return _with_last(self._lines, self._line)

    @property
    def speeches(self) -> Counter[int]:
        """How many speeches there are of each length in words.

        A speech is what stands between empty lines.
        """
        return _with_last(self._speeches, self._speech)


def summary(
    tally: CorpusStatistics, report_batch_size: int, report_block_size: int
) -> dict[str, int | float]:
    """The corpus in nine figures.

    `batches_per_epoch` is how many batches of report_batch_size x report_block_size all tokens
    fill. `unseen_val_share` is the share of validation tokens, repeats counted, whose id is nowhere
    in training: a model can only guess at those.
    """
    train_tokens, val_tokens = int(tally.train.sum()), int(tally.val.sum())
    tokens = train_tokens + val_tokens
    return {
        "characters": tally.characters,
        "tokens": tokens,
        "unique_tokens": int(np.count_nonzero(tally.train + tally.val)),
        "vocabulary": len(tally.train),
        "characters_per_token": tally.characters / tokens,
        "train_tokens": train_tokens,
        "val_tokens": val_tokens,
        "batches_per_epoch": tokens // (report_batch_size * report_block_size),
        "unseen_val_share": int(tally.val[tally.train == 0].sum()) / val_tokens,
    }


def most_common_tokens(
    counts: np.ndarray, decode: Callable[[list[int]], str], top: int = 100
) -> pd.DataFrame:
    """The `top` commonest tokens: columns rank, id, text, count, share.

    `counts` is how often each id occurs, [vocabulary]. `text` is the token as Python writes a
    string, so that spaces and line ends show; `share` is of all tokens. Equal counts are ranked by
    id.
    """
    series = pd.Series(counts).rename_axis("id").rename("count")
    table = series[series > 0].sort_values(ascending=False, kind="stable").head(top).reset_index()
    table.insert(0, "rank", table.index + 1)
    table.insert(2, "text", [repr(decode([token])) for token in table["id"]])
    table["share"] = table["count"] / counts.sum()
    return table


def _with_last(ended: Counter[int], last: int) -> Counter[int]:
    """The counts with the last length, and without lengths of 0."""
    counts = ended + Counter([last])
    del counts[0]
    return counts
