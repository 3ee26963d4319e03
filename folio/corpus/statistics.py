"""Statistics of a corpus: counts of tokens, lines and speeches, and the most common tokens.

All of them are computed from running counts, so memory use does not grow with the text.
"""

import re
from collections import Counter
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

from folio.tokens.tokenizer import END_OF_TEXT

if TYPE_CHECKING:
    import pandas as pd


class CorpusStatistics:
    """Running counts over a text that is added piece by piece.

    Like those of tokenizer.pieces, the pieces must end after a non-white-space character and before
    white space, except before `end_document`. Consecutive parts of a text may be counted separately
    and merged.
    """

    def __init__(self, vocab_size: int, continues: bool = False) -> None:
        """continues: whether the first piece continues the text of another part."""
        self.characters = 0
        self.start = ""  # the first 300 characters
        self.end_of_text = 0  # occurrences of <|endoftext|>, which is encoded as plain text
        self.nul_characters = 0
        self.train = np.zeros(vocab_size, dtype=np.int64)  # occurrences of each id in training
        self.unused = np.zeros(vocab_size, dtype=np.int64)  # ... before the part that is used
        self.val = np.zeros(vocab_size, dtype=np.int64)  # occurrences of each id in validation
        self._lines = _Lengths(continues)  # in characters
        self._speeches = _Lengths(continues)  # in words

    def add(self, text: str, train: np.ndarray, val: np.ndarray) -> None:
        """Count the next piece of the text, which must not be empty.

        `train` and `val` are the token ids, [tokens], of its training and validation parts.
        """
        self.add_text(text)
        self.train += np.bincount(train, minlength=len(self.train))
        self.val += np.bincount(val, minlength=len(self.val))

    def add_text(self, text: str) -> None:
        """Count the next piece of the text, without its tokens."""
        self.characters += len(text)
        self.start += text[: 300 - len(self.start)]
        self.end_of_text += text.count(END_OF_TEXT)  # no piece ends within it
        self.nul_characters += text.count("\0")
        lines = text.splitlines()
        # A line that continues is not blank: even its blanks are counted.
        first = len(lines[0]) if self._lines.last or self._lines.is_continued else 0
        lengths = [0 if line.isspace() else len(line) for line in lines]
        self._lines.add([first or lengths[0], *lengths[1:]])
        self._speeches.add([len(speech.split()) for speech in re.split(r"\n\s*\n", text)])

    def end_document(self) -> None:
        """End the current line and speech: the next piece belongs to another document."""
        self._lines.add([0, 0])
        self._speeches.add([0, 0])

    def merge(self, following: "CorpusStatistics") -> None:
        """Add the counts of the part of the text that follows."""
        self.characters += following.characters
        self.start += following.start[: 300 - len(self.start)]
        self.end_of_text += following.end_of_text
        self.nul_characters += following.nul_characters
        self.train += following.train
        self.val += following.val
        self._lines.merge(following._lines)
        self._speeches.merge(following._speeches)

    @property
    def counts(self) -> np.ndarray:
        """How often each id occurs in the whole text, [vocabulary] int64."""
        return self.unused + self.train + self.val

    @property
    def lines(self) -> Counter[int]:
        """The number of lines of each length in characters, without blank lines."""
        return self._lines.all()

    @property
    def speeches(self) -> Counter[int]:
        """The number of speeches of each length in words. Blank lines separate the speeches."""
        return self._speeches.all()

    def to_json(self) -> dict[str, Any]:
        """Everything except the occurrences of each id."""
        names = ("characters", "start", "end_of_text", "nul_characters")
        found = {name: getattr(self, name) for name in names}
        return found | {"lines": self._lines.to_json(), "speeches": self._speeches.to_json()}

    @classmethod
    def from_json(cls, state: dict[str, Any], vocab_size: int) -> "CorpusStatistics":
        """What to_json returned, with no occurrences of any id."""
        made = cls(vocab_size)
        vars(made).update({k: v for k, v in state.items() if k not in ("lines", "speeches")})
        made._lines = _Lengths.from_json(state["lines"])
        made._speeches = _Lengths.from_json(state["speeches"])
        return made


class _Lengths:
    """How many items of each length there are in a text that is added piece by piece; an item may
    continue in the next piece, and the first may continue one of a part that is counted separately.

    The counts are bounded: if they had as many as n lengths, the text would have n * n / 2 units.
    """

    def __init__(self, continues: bool) -> None:
        self.complete: Counter[int] = Counter()  # number of complete items by length
        self.first: int | None = None if continues else 0  # length of the first, once complete
        self.last = 0  # length so far of the last, which the next piece may continue

    @property
    def is_continued(self) -> bool:
        """Whether the current item is the first one, and continues one of another part."""
        return self.first is None

    def add(self, lengths: list[int]) -> None:
        """Add the items of a piece; the first continues the last one so far."""
        lengths[0] += self.last
        self.last = lengths.pop()
        if self.first is None and lengths:
            self.first = lengths.pop(0)
        self.complete.update(lengths)

    def merge(self, following: "_Lengths") -> None:
        if following.first is None:
            self.last += following.last
            return
        self.add([following.first, following.last])
        self.complete.update(following.complete)

    def all(self) -> Counter[int]:
        """The counts, with the last item, without those of length 0."""
        counts = self.complete + Counter([self.last])
        del counts[0]
        return counts

    def to_json(self) -> list[Any]:
        return [self.first, self.last, [*self.complete.items()]]

    @classmethod
    def from_json(cls, state: list[Any]) -> "_Lengths":
        made = cls(continues=False)
        made.first, made.last, complete = state
        made.complete = Counter(dict(complete))
        return made


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
    tokens = int(statistics.counts.sum())
    return {
        "characters": statistics.characters,
        "tokens": tokens,
        "unique_tokens": int(np.count_nonzero(statistics.counts)),
        "vocabulary": len(statistics.train),
        "characters_per_token": statistics.characters / tokens,
        "train_tokens": train_tokens,
        "val_tokens": val_tokens,
        "batches_per_epoch": tokens // (report_batch_size * report_block_size),
        "unseen_val_share": int(statistics.val[statistics.train == 0].sum()) / val_tokens,
    }


def most_common_tokens(
    counts: np.ndarray, decode: Callable[[list[int]], str], top: int = 100
) -> "pd.DataFrame":
    """Return a table of the `top` most common tokens: rank, id, text, count, share.

    `counts`, [vocabulary], is the number of occurrences of each id. `text` is the repr of the
    token, which makes spaces and line breaks visible. `share` is the fraction of all tokens. Equal
    counts are ranked by id.
    """
    import pandas as pd  # the processes that encode a corpus do not need it

    series = pd.Series(counts).rename_axis("id").rename("count")
    table = series[series > 0].sort_values(ascending=False, kind="stable").head(top).reset_index()
    table.insert(0, "rank", table.index + 1)
    table.insert(2, "text", [repr(decode([token])) for token in table["id"]])
    table["share"] = table["count"] / counts.sum()
    return table
