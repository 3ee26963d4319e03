"""Statistics of a corpus: counts of tokens, lines and speeches, and the most common tokens.

All of them are computed from running counts, so memory use does not grow with the text.
"""

import re
from collections import Counter
from collections.abc import Callable

import numpy as np
import pandas as pd

from folio.tokens.tokenizer import END_OF_TEXT


class CorpusStatistics:
    """Running counts over a text that is added piece by piece.

    Like those of tokenizer.pieces, the pieces must end after a non-white-space character and before
    white space.
    """

    def __init__(self, vocab_size: int) -> None:
        self.characters = 0
        self.start = ""  # the first 300 characters
        self.end_of_text = 0  # occurrences of <|endoftext|>, which is encoded as plain text
        self.nul_characters = 0
        self.train = np.zeros(vocab_size, dtype=np.int64)  # occurrences of each id in training
        self.val = np.zeros(vocab_size, dtype=np.int64)  # occurrences of each id in validation
        self._lines: Counter[int] = Counter()  # number of complete lines by length
        self._speeches: Counter[int] = Counter()  # number of complete speeches by length
        self._last_line = self._last_speech = 0  # lengths so far; the next piece may continue them

    def add(self, text: str, train: np.ndarray, val: np.ndarray) -> None:
        """Count the next piece of the text, which must not be empty.

        `train` and `val` are the token ids, [tokens], of its training and validation parts.
        """
        self.characters += len(text)
        self.start += text[: 300 - len(self.start)]
        self.end_of_text += text.count(END_OF_TEXT)  # no piece ends within it
        self.nul_characters += text.count("\0")
        self.train += np.bincount(train, minlength=len(self.train))
        self.val += np.bincount(val, minlength=len(self.val))

        lines = text.splitlines()
        lengths = [0 if line.isspace() else len(line) for line in lines]
        if self._last_line:  # a line that is not blank continues: count even its trailing blanks
            lengths[0] = self._last_line + len(lines[0])
        self._last_line = lengths.pop()
        self._lines.update(lengths)

        words = [len(speech.split()) for speech in re.split(r"\n\s*\n", text)]
        words[0] += self._last_speech
        self._last_speech = words.pop()
        self._speeches.update(words)

    @property
    def lines(self) -> Counter[int]:
        """The number of lines of each length in characters, without blank lines."""
        return _with_last(self._lines, self._last_line)

    @property
    def speeches(self) -> Counter[int]:
        """The number of speeches of each length in words. Blank lines separate the speeches."""
        return _with_last(self._speeches, self._last_speech)


def summarize(
    statistics: CorpusStatistics, report_batch_size: int, report_block_size: int
) -> dict[str, int | float]:
    """Return nine summary statistics of the corpus.

    `batches_per_epoch` is the number of complete batches (report_batch_size windows of
    report_block_size tokens) in the whole corpus. `unseen_val_share` is the fraction of the
    validation tokens, repetitions included, that never occur in training: a model can only guess
    those.
    """
    train_tokens, val_tokens = int(statistics.train.sum()), int(statistics.val.sum())
    tokens = train_tokens + val_tokens
    return {
        "characters": statistics.characters,
        "tokens": tokens,
        "unique_tokens": int(np.count_nonzero(statistics.train + statistics.val)),
        "vocabulary": len(statistics.train),
        "characters_per_token": statistics.characters / tokens,
        "train_tokens": train_tokens,
        "val_tokens": val_tokens,
        "batches_per_epoch": tokens // (report_batch_size * report_block_size),
        "unseen_val_share": int(statistics.val[statistics.train == 0].sum()) / val_tokens,
    }


def most_common_tokens(
    counts: np.ndarray, decode: Callable[[list[int]], str], top: int = 100
) -> pd.DataFrame:
    """Return a table of the `top` most common tokens: rank, id, text, count, share.

    `counts`, [vocabulary], is the number of occurrences of each id. `text` is the repr of the
    token, which makes spaces and line breaks visible. `share` is the fraction of all tokens. Equal
    counts are ranked by id.
    """
    series = pd.Series(counts).rename_axis("id").rename("count")
    table = series[series > 0].sort_values(ascending=False, kind="stable").head(top).reset_index()
    table.insert(0, "rank", table.index + 1)
    table.insert(2, "text", [repr(decode([token])) for token in table["id"]])
    table["share"] = table["count"] / counts.sum()
    return table


def _with_last(complete: Counter[int], last: int) -> Counter[int]:
    """Return the counts with the last length added, without lengths of 0."""
    counts = complete + Counter([last])
    del counts[0]
    return counts
