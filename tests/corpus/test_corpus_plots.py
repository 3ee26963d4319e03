"""Plots of the statistics of a corpus."""

from collections import Counter

import numpy as np
import pytest
from matplotlib.image import imread

from folio import plots
from folio.corpus import plots as corpus_plots
from folio.corpus.statistics import CorpusStatistics
from folio.tokens import tokenizer

TEXT = "KATE:\nA line.\nAnother line\n\nPETRUCHIO:\nOne.\n\n\n"


def statistics_of(text, ids=()):
    """The statistics of a text with these ids for training."""
    statistics = CorpusStatistics(tokenizer.VOCAB_SIZE)
    statistics.add(text, np.array(ids, dtype=np.uint16), np.empty(0, dtype=np.uint16))
    return statistics


def test_percentile_is_that_of_numpy_bit_for_bit():
    random = np.random.default_rng(1)
    for _ in range(2_000):
        values = random.integers(1, 10 ** random.integers(1, 7), size=random.integers(1, 300))
        for percent in (50, 99):
            expected = np.percentile(values, percent)
            assert corpus_plots._percentile(Counter(values.tolist()), percent) == expected


def test_rank_frequency_shows_every_token_in_order_of_frequency():
    counts = np.array([0, 9, 0, 5, 0, 1])
    [axes] = corpus_plots.rank_frequency(counts, "mine").axes
    curve, zipf = axes.lines
    assert curve.get_xdata().tolist() == [1, 2, 3]
    assert curve.get_ydata().tolist() == [9, 5, 1]
    assert np.allclose(np.diff(np.log(zipf.get_ydata())), -np.diff(np.log([1, 2, 3])))
    assert (axes.get_xscale(), axes.get_yscale()) == ("log", "log")


def test_plots_have_titles_and_axis_labels():
    for figure in [
        corpus_plots.rank_frequency(np.array([0, 2, 1]), "mine"),
        corpus_plots.length_histograms(statistics_of(TEXT), "mine"),
    ]:
        assert figure.get_suptitle().startswith("mine: ")
        for axes in figure.axes:
            assert axes.get_xlabel() and axes.get_ylabel()


@pytest.mark.filterwarnings("error::UserWarning")
@pytest.mark.parametrize(
    "name",
    [
        "data/raw/$a_{$.txt",  # matplotlib would fail to parse this as a formula
        "\\frac{\\alpha",
        "two\nlines",
        "\u4e2d\u6587 \U0001f642 \U0010ffff",  # the font has none of these characters
        "\0 \t \x1b[31m" + "x" * 4_000,
    ],
)
def test_plots_accept_any_corpus_name(tmp_path, name):
    plots.save(corpus_plots.rank_frequency(np.array([1]), name), tmp_path / "rank.png")
    plots.save(corpus_plots.length_histograms(statistics_of("x"), name), tmp_path / "lengths.png")


@pytest.mark.filterwarnings("error::UserWarning")
@pytest.mark.parametrize(
    "text",
    ["x", " \n\t x \n\n", "x" * 1_000_000, "\0" * 10 + "\u2028x\x85", " x" * 100_000],
    ids=["letter", "blanks", "line", "controls", "words"],
)
def test_plots_accept_any_text(tmp_path, text):
    statistics = statistics_of(text, ids=tokenizer.encode(text))
    plots.save(corpus_plots.rank_frequency(statistics.train, "mine"), tmp_path / "rank.png")
    plots.save(corpus_plots.length_histograms(statistics, "mine"), tmp_path / "lengths.png")


def test_long_title_is_shortened_at_its_start():
    figure = corpus_plots.length_histograms(
        statistics_of(TEXT), "data/raw/" + "long/" * 50 + "verses.txt"
    )
    title = figure.get_suptitle()
    assert title.startswith("...") and "/verses.txt: line and" in title and len(title) < 80


def test_saved_plot_is_not_blank_and_is_reproducible(tmp_path):
    for name in ["one.png", "two.png"]:
        plots.save(corpus_plots.length_histograms(statistics_of(TEXT), "mine"), tmp_path / name)
    assert (tmp_path / "one.png").read_bytes() == (tmp_path / "two.png").read_bytes()
    image = imread(tmp_path / "one.png")
    assert image.shape[:2] == (630, 1500)
    assert image.std() > 0.1
