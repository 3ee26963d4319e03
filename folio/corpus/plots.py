"""Plots of what is in the corpus."""

from collections import Counter

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from folio import plots
from folio.corpus.statistics import CorpusStatistics
from folio.plots import BLUE, GREY


def rank_frequency(counts: np.ndarray, title: str) -> Figure:
    """How often the commonest token occurs, the second, and so on; both axes are logarithmic.

    `counts` is how often each id occurs, [vocabulary]. The dashed line falls as 1/rank (Zipf's
    law) from where it fits the middle ranks.
    """
    counts = np.sort(counts[counts > 0])[::-1]
    ranks = np.arange(1, len(counts) + 1)
    middle = slice(len(counts) // 1000, max(1, len(counts) // 10))
    level = np.exp(np.mean(np.log(counts[middle] * ranks[middle])))

    figure, [axes] = plots.new_figure(1, (7, 5))
    # Limits of our own: for a single token, matplotlib would find none, and say so.
    highest = 1.5 * max(counts[0], level)
    axes.set(xscale="log", yscale="log", xlim=(0.7, 1.5 * len(counts)), ylim=(0.7, highest))
    axes.plot(ranks, counts, color=BLUE, linewidth=2, label="tokens of the corpus")
    axes.plot(ranks, level / ranks, "--", color=GREY, linewidth=1, label="1 / rank (Zipf)")
    axes.set_xlabel("rank of the token")
    axes.set_ylabel("occurrences")
    axes.legend(frameon=False)
    heading = f"{_short(title)}: {len(counts):,} different tokens among {counts.sum():,}"
    figure.suptitle(heading, parse_math=False)
    return figure


def lengths(statistics: CorpusStatistics, title: str) -> Figure:
    """Histograms of how long the lines and the speeches are."""
    figure, [left, right] = plots.new_figure(2, (10, 4.2))
    _histogram(left, statistics.lines, "lines", "characters in a line")
    _histogram(right, statistics.speeches, "speeches", "words in a speech")
    figure.suptitle(f"{_short(title)}: how long lines and speeches are", parse_math=False)
    return figure


def _short(title: str) -> str:
    """The end of a title that would not fit above a picture: of a path, it says most."""
    return title if len(title) <= 40 else f"...{title[-37:]}"


def _histogram(axes: Axes, counts: Counter[int], nouns: str, label: str) -> None:
    """`counts` is how many there are of each length."""
    # The longest 1 % are left out: they would squeeze the rest into a corner.
    longest = int(_percentile(counts, 99)) + 1
    bins = np.arange(0, longest + 2, max(1, longest // 60))
    axes.hist(list(counts), bins=bins, weights=list(counts.values()), color=BLUE)
    median = _percentile(counts, 50)
    axes.axvline(median, color="black", linewidth=1, linestyle="--", label=f"median {median:g}")
    axes.set_title(f"{counts.total():,} {nouns}, the longest of {max(counts):,}")
    axes.set_xlim(left=0)
    axes.set_xlabel(label)
    axes.set_ylabel(nouns)
    axes.legend(frameon=False)


def _percentile(counts: Counter[int], percent: float) -> float:
    """np.percentile of all lengths, bit for bit, from how many there are of each."""
    ordered = sorted(counts)
    ends = np.cumsum([counts[length] for length in ordered])
    place = (counts.total() - 1) * (percent / 100)  # among all of them in order, from 0
    low, high = (
        ordered[np.searchsorted(ends, at, side="right")] for at in (int(place), -int(-place // 1))
    )
    share = place - int(place)
    # numpy's _lerp, which goes from the nearer end
    return low + (high - low) * share if share < 0.5 else high - (high - low) * (1 - share)
