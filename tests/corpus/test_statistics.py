"""Statistics of a corpus: the summary, the most common tokens, lines and speeches."""

import re
from collections import Counter

import numpy as np
import pytest

from folio.corpus.statistics import CorpusStatistics, most_common_tokens, summarize
from folio.tokens import tokenizer

TEXT = "KATE:\nA line.\nAnother line\n\nPETRUCHIO:\nOne.\n\n\n"


def statistics_of(*pieces):
    """The statistics of a text in pieces, without token ids."""
    statistics = CorpusStatistics(tokenizer.VOCAB_SIZE)
    none = np.empty(0, dtype=np.uint16)
    for piece in pieces:
        statistics.add(piece, none, none)
    return statistics


def test_summary_has_exactly_the_figures_of_the_report():
    statistics = CorpusStatistics(50_257)
    statistics.add("ten letter", np.array([5, 5, 7]), np.array([], dtype=np.uint16))
    statistics.add(" and as many", np.array([9]), np.array([5, 8, 8, 8]))
    assert list(summarize(statistics, 1, 3).items()) == [
        ("characters", 22),
        ("tokens", 8),
        ("unique_tokens", 4),
        ("vocabulary", 50_257),
        ("characters_per_token", 2.75),
        ("train_tokens", 4),
        ("val_tokens", 4),
        ("batches_per_epoch", 2),
        ("unseen_val_share", 0.75),  # three times id 8
    ]


def test_most_common_tokens_are_ranked_by_count_and_then_by_id():
    ids = tokenizer.encode("b a a\n a b c")
    table = most_common_tokens(np.bincount(ids), tokenizer.decode, top=3)
    assert list(table.columns) == ["rank", "id", "text", "count", "share"]
    assert table["rank"].tolist() == [1, 2, 3]
    assert table["text"].tolist() == ["' a'", r"'b'", r"'\n'"]
    assert table["count"].tolist() == [3, 1, 1]
    assert table["share"].tolist() == [3 / len(ids), 1 / len(ids), 1 / len(ids)]


@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_lines_are_counted_by_characters_without_blank_lines(end):
    assert statistics_of(TEXT.replace("\n", end)).lines == {5: 1, 7: 1, 12: 1, 10: 1, 4: 1}


@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_speeches_are_counted_by_words_and_separated_by_blank_lines(end):
    assert statistics_of(TEXT.replace("\n", end)).speeches == {5: 1, 2: 1}


@pytest.mark.parametrize("size", [1, 5, 30])
def test_lines_and_speeches_do_not_depend_on_how_the_text_is_split(size):
    random = np.random.default_rng(size)
    alphabet = list("   \n\n\n\t\r\x85\u2028\u3000\x1c\x1f\xa0\u200b\0abc\u4e2d")
    for _ in range(1_000):
        text = "".join(random.choice(alphabet, 1 + random.integers(80)))
        statistics = statistics_of(*tokenizer.pieces(text, size))
        lines = [len(line) for line in text.splitlines() if line.strip()]
        speeches = re.split(r"\n\s*\n", text)
        assert statistics.lines == Counter(lines)
        assert statistics.speeches == Counter(len(s.split()) for s in speeches if s.strip())
        assert (statistics.characters, statistics.start) == (len(text), text)
