"""Plots of the statistics of a corpus."""

from collections import Counter

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from folio import plots
from folio.corpus.statistics import CorpusStatistics
from folio.plots import BLUE, GREY


def rank_frequency(counts: np.ndarray, title: str) -> Figure:
    """Plot the number of occurrences of each token against its rank, on logarithmic axes.

    `counts`, [vocabulary], is the number of occurrences of each id. The dashed line is Zipf's law,
    1/rank, fitted to the middle ranks.
    """
    counts = np.sort(counts[counts > 0])[::-1]
    ranks = np.arange(1, len(counts) + 1)
    middle = slice(len(counts) // 1000, max(1, len(counts) // 10))
    level = np.exp(np.mean(np.log(counts[middle] * ranks[middle])))

    figure, [axes] = plots.new_figure(1, (7, 5))
    # Explicit limits: for a single token, matplotlib would warn that it cannot choose any.
    highest = 1.5 * max(counts[0], level)
    axes.set(xscale="log", yscale="log", xlim=(0.7, 1.5 * len(counts)), ylim=(0.7, highest))
    axes.plot(ranks, counts, color=BLUE, linewidth=2, label="tokens of the corpus")
    axes.plot(ranks, level / ranks, "--", color=GREY, linewidth=1, label="1 / rank (Zipf)")
    axes.set_xlabel("token rank")
    axes.set_ylabel("occurrences")
    axes.legend(frameon=False)
    heading = f"{_shorten(title)}: {len(counts):,} unique tokens, {counts.sum():,} in total"
    figure.suptitle(heading, parse_math=False)
    return figure


def length_histograms(statistics: CorpusStatistics, title: str) -> Figure:
    """Plot histograms of line and speech lengths."""
    figure, [left, right] = plots.new_figure(2, (10, 4.2))
    _histogram(left, statistics.lines, "lines", "characters per line")
    _histogram(right, statistics.speeches, "speeches", "words per speech")
    figure.suptitle(f"{_shorten(title)}: line and speech lengths", parse_math=False)
    return figure


def _shorten(title: str) -> str:
    """Return the last 40 characters: the end of a long path is its most informative part."""
    return title if len(title) <= 40 else f"...{title[-37:]}"


def _histogram(axes: Axes, counts: Counter[int], noun: str, label: str) -> None:
    """Draw a histogram of lengths; `counts` is the number of items of each length."""
    # The longest 1 % are omitted: they would compress the rest of the histogram.
    longest = int(_percentile(counts, 99)) + 1
    bins = list(range(0, longest + 2, max(1, longest // 60)))
    axes.hist(list(counts), bins=bins, weights=list(counts.values()), color=BLUE)
    median = _percentile(counts, 50)
    axes.axvline(median, color="black", linewidth=1, linestyle="--", label=f"median {median:g}")
    axes.set_title(f"{counts.total():,} {noun}, maximum length {max(counts):,}")
    axes.set_xlim(left=0)
    axes.set_xlabel(label)
    axes.set_ylabel(noun)
    axes.legend(frameon=False)


def _percentile(counts: Counter[int], percent: float) -> float:
    """Return exactly what np.percentile returns for all lengths, given how often each occurs."""
    ordered = sorted(counts)
    ends = np.cumsum([counts[length] for length in ordered])
    position = (counts.total() - 1) * (percent / 100)  # in the sorted list of all lengths, from 0
    low, high = (
        ordered[np.searchsorted(ends, index, side="right")]
        for index in (int(position), -int(-position // 1))
    )
    fraction = position - int(position)
    # Like numpy's _lerp, interpolate from the nearer end.
    if fraction < 0.5:
        return low + (high - low) * fraction
    return high - (high - low) * (1 - fraction)
