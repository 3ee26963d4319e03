"""What is in the corpus: the figures, the table, the pictures."""

import re
from collections import Counter

import numpy as np
import pytest
from matplotlib.image import imread

from folio import plots
from folio.corpus import plots as corpus_plots, statistics
from folio.tokens import tokenizer

TEXT = "KATE:\nA line.\nAnother line\n\nPETRUCHIO:\nOne.\n\n\n"


def tallied(text, *, pieces=None, ids=()):
    """A tally of a text, or of its pieces, with these ids for training."""
    tally = statistics.CorpusStatistics(tokenizer.VOCAB_SIZE)
    for piece in [text] if pieces is None else pieces:
        tally.add(piece, np.array(ids, dtype=np.uint16), np.empty(0, dtype=np.uint16))
    return tally


def test_summary_has_exactly_the_figures_that_the_report_names():
    tally = statistics.CorpusStatistics(50_257)
    tally.add("ten letter", np.array([5, 5, 7]), np.array([], dtype=np.uint16))
    tally.add(" and as many", np.array([9]), np.array([5, 8, 8, 8]))
    assert list(statistics.summary(tally, 1, 3).items()) == [
        ("characters", 22),
        ("tokens", 8),
        ("unique_tokens", 4),
        ("vocabulary", 50_257),
        ("characters_per_token", 2.75),
        ("train_tokens", 4),
        ("val_tokens", 4),
        ("batches_per_epoch", 2),
        ("unseen_val_share", 0.75),  # 8, three times
    ]


def test_commonest_tokens_are_ranked_by_count_and_then_by_id():
    ids = tokenizer.encode("b a a\n a b c")
    table = statistics.most_common_tokens(np.bincount(ids), tokenizer.decode, top=3)
    assert list(table.columns) == ["rank", "id", "text", "count", "share"]
    assert table["rank"].tolist() == [1, 2, 3]
    assert table["text"].tolist() == ["' a'", r"'b'", r"'\n'"]
    assert table["count"].tolist() == [3, 1, 1]
    assert table["share"].tolist() == [3 / len(ids), 1 / len(ids), 1 / len(ids)]


@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_lines_are_measured_in_characters_and_empty_ones_left_out(end):
    assert tallied(TEXT.replace("\n", end)).lines == {5: 1, 7: 1, 12: 1, 10: 1, 4: 1}


@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_speeches_are_measured_in_words_and_end_at_empty_lines(end):
    assert tallied(TEXT.replace("\n", end)).speeches == {5: 1, 2: 1}


@pytest.mark.parametrize("size", [1, 5, 30])
def test_lines_and_speeches_are_those_of_the_whole_text_however_it_is_cut(size):
    random = np.random.default_rng(size)
    alphabet = list("   \n\n\n\t\r\x85\u2028\u3000\x1c\x1f\xa0\u200b\0abc\u4e2d")
    for _ in range(1_000):
        text = "".join(random.choice(alphabet, 1 + random.integers(80)))
        tally = tallied(text, pieces=tokenizer.pieces(text, size))
        lines = [len(line) for line in text.splitlines() if line.strip()]
        speeches = re.split(r"\n\s*\n", text)
        assert tally.lines == Counter(lines)
        assert tally.speeches == Counter(len(s.split()) for s in speeches if s.strip())
        assert (tally.characters, tally.start) == (len(text), text)


def test_a_percentile_is_numpys_bit_for_bit():
    random = np.random.default_rng(1)
    for _ in range(2_000):
        values = random.integers(1, 10 ** random.integers(1, 7), size=random.integers(1, 300))
        for percent in (50, 99):
            expected = np.percentile(values, percent)
            assert statistics._percentile(Counter(values.tolist()), percent) == expected


def test_the_rank_frequency_curve_holds_every_token_from_the_commonest_down():
    counts = np.array([0, 9, 0, 5, 0, 1])
    [axes] = corpus_plots.rank_frequency(counts, "mine").axes
    curve, zipf = axes.lines
    assert curve.get_xdata().tolist() == [1, 2, 3]
    assert curve.get_ydata().tolist() == [9, 5, 1]
    assert np.allclose(np.diff(np.log(zipf.get_ydata())), -np.diff(np.log([1, 2, 3])))
    assert (axes.get_xscale(), axes.get_yscale()) == ("log", "log")


def test_pictures_are_titled_and_labelled():
    for figure in [
        corpus_plots.rank_frequency(np.array([0, 2, 1]), "mine"),
        corpus_plots.lengths(tallied(TEXT), "mine"),
    ]:
        assert figure.get_suptitle().startswith("mine: ")
        for axes in figure.axes:
            assert axes.get_xlabel() and axes.get_ylabel()


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(
    "name",
    [
        "data/raw/$a_{$.txt",  # to matplotlib, a formula that does not parse
        "\\frac{\\alpha",
        "two\nlines",
        "\u4e2d\u6587 \U0001f642 \U0010ffff",  # nothing of it is in the font
        "\0 \t \x1b[31m",
        "x" * 4_000,
        "",
    ],
)
def test_a_text_of_any_name_can_be_drawn(tmp_path, name):
    plots.save(corpus_plots.rank_frequency(np.array([1]), name), tmp_path / "rank.png")
    plots.save(corpus_plots.lengths(tallied("x"), name), tmp_path / "lengths.png")


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(
    "text",
    ["x", " \n\t x \n\n", "x" * 1_000_000, "\0" * 10, "x\n" * 100, "\u2028x\x85", " x" * 100_000],
    ids=["letter", "blanks", "line", "nuls", "lines", "separators", "words"],
)
def test_any_text_can_be_drawn(tmp_path, text):
    tally = tallied(text, ids=tokenizer.encode(text))
    plots.save(corpus_plots.rank_frequency(tally.train, "mine"), tmp_path / "rank.png")
    plots.save(corpus_plots.lengths(tally, "mine"), tmp_path / "lengths.png")


def test_a_long_title_keeps_its_end():
    figure = corpus_plots.lengths(tallied(TEXT), "data/raw/" + "long/" * 50 + "verses.txt")
    title = figure.get_suptitle()
    assert title.startswith("...") and "/verses.txt: how long" in title and len(title) < 80


def test_a_saved_picture_is_not_blank_and_is_the_same_each_time(tmp_path):
    for name in ["one.png", "two.png"]:
        plots.save(corpus_plots.lengths(tallied(TEXT), "mine"), tmp_path / name)
    assert (tmp_path / "one.png").read_bytes() == (tmp_path / "two.png").read_bytes()
    picture = imread(tmp_path / "one.png")
    assert picture.shape[:2] == (630, 1500)
    assert picture.std() > 0.1
