"""A parallel-coordinates plot of a sweep: an axis per param and one for the loss, a line per trial.

Implemented here because the alternatives fall short (LOG.md): Optuna's plot does not highlight the
best trial and draws lines through the same value on top of each other, and pandas' plot has one
scale for all axes.
"""

import itertools
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap, Normalize
from matplotlib.ticker import Locator, LogLocator, MaxNLocator

from folio import plots
from folio.sweeps.space import Trial, format_value, is_log_scale

_COLOURS = LinearSegmentedColormap.from_list("loss", [plots.BLUE, "#9fb8cc", "#dfe3e8"])
_MAX_LABELLED = 8  # up to this many distinct values, the ticks are these, not round numbers
_MIN_TICK_GAP = 0.045  # as a fraction of the axis height
_MAX_SPREAD = 0.05  # the space for the lines through one value, as a fraction of the axis height


class Scale:
    """Positions on an axis, from 0 at the bottom to 1 at the top.

    Numbers are placed by their value or its logarithm. Otherwise the distinct values are evenly
    spaced: sorted numbers with null above them, or strings and booleans in the order of the trials.
    """

    def __init__(self, values: Sequence[Any]):
        not_null = [value for value in dict.fromkeys(values) if value is not None]
        if all(type(value) in (int, float) for value in not_null):
            not_null.sort()
        self.values = not_null + [None] * (None in values)
        self.numeric = all(type(value) in (int, float) for value in values)
        self.log = is_log_scale(values)

    def position(self, value: Any) -> float:
        if not self.numeric:
            return self.values.index(value) / max(1, len(self.values) - 1)
        ends = (self.values[0], self.values[-1], value)
        low, high, x = map(math.log, ends) if self.log else ends
        return (x - low) / (high - low) if high > low else 0.5

    def ticks(self, round_numbers: bool = False) -> list[tuple[float, str]]:
        """(position, label) of each tick: at the values of the trials, or at round numbers."""
        if not self.numeric or (len(self.values) <= _MAX_LABELLED and not round_numbers):
            places = [self.position(value) for value in self.values]
            gaps = [math.inf, *(b - a for a, b in itertools.pairwise(places))]
            return [
                (place, format_value(value))
                for place, value, gap in zip(places, self.values, gaps, strict=True)
                if gap > _MIN_TICK_GAP
            ]
        low, high = self.values[0], self.values[-1]
        locator: Locator = MaxNLocator(5, integer=all(type(v) is int for v in self.values))
        if self.log:
            locator = LogLocator(subs=(1, 2, 5) if high < 1e4 * low else (1,), numticks=99)
        found = np.asarray(locator.tick_values(low, high)).tolist()
        # A round number may have an inexact sum as its tick, such as 5.6000000000000005.
        return [(self.position(x), f"{x:.10g}") for x in found if low <= x <= high]


def draw(trials: list[Trial], losses: list[float], path: Path) -> None:
    """Write the plot as a PNG.

    trials: all with the same params. losses: their validation losses in nats/token.
    """
    names = list(trials[0])
    columns = [*([trial[name] for trial in trials] for name in names), losses]
    scales = [Scale(column) for column in columns]
    places = [[s.position(v) for v in c] for s, c in zip(scales, columns, strict=True)]
    heights, order = np.array(places), np.argsort(losses)
    for row in heights[:-1]:
        _separate(row, order)
    figure, [ax] = plots.new_figure(inches=(max(7, 1.7 * len(columns)), 4.2))
    _draw_lines(ax, heights, losses, order)
    for x, scale in enumerate(scales[:-1]):
        _draw_axis(ax, x, scale.ticks(), "right")
    best = scales[-1].position(losses[order[0]])
    ticks = [tick for tick in scales[-1].ticks(round_numbers=True) if tick[0] - best > 0.05]
    _draw_axis(ax, len(names), ticks, "left")
    ax.annotate(
        f"best {losses[order[0]]:.3f}",
        (len(names), best),
        xytext=(8, 0),
        textcoords="offset points",
        va="center",
        color=plots.ORANGE,
        fontweight="bold",
    )
    labels = [
        name.replace(".", ".\n", 1) + (" (log)" if scale.log else "")
        for name, scale in zip(names, scales, strict=False)
    ]
    ax.set_xticks(range(len(columns)), [*labels, "validation loss,\nnats/token"])
    ax.set_yticks([])
    ax.set(xlim=(-0.35, len(names) + 0.55), ylim=(-0.05, 1.05))
    ax.set_title(f"Validation loss of {len(trials)} trials, best in orange")
    ax.spines[:].set_visible(False)
    ax.grid(visible=False)
    ax.tick_params(length=0)
    plots.save(figure, path)


def _draw_lines(ax: Axes, heights: np.ndarray, losses: list[float], order: np.ndarray) -> None:
    """Draw a line per trial. heights: [axes, trials]; order: the trials, best first."""
    # The colour scale ends at three times the median's distance from the best loss, so that an
    # outlier does not make all others look the same.
    best, median, worst = min(losses), float(np.median(losses)), max(losses)
    limit = min(worst, best + 3 * (median - best)) if median > best else worst
    shade = Normalize(best, limit)
    for trial in order[::-1]:
        is_best = trial == order[0]
        ax.plot(
            *_smooth(heights[:, trial]),
            color=plots.ORANGE if is_best else _COLOURS(shade(losses[trial])),
            lw=2.6 if is_best else 1.3,
            zorder=3 if is_best else 2,
            solid_capstyle="round",
        )


def _draw_axis(ax: Axes, x: int, ticks: list[tuple[float, str]], align: str) -> None:
    """Draw a vertical axis at x, with its labels on the left (align "right") or on the right."""
    outwards = -1 if align == "right" else 1
    ax.vlines(x, 0, 1, color=plots.GREY, lw=1, zorder=1)
    ax.hlines([y for y, _ in ticks], x, x + outwards * 0.015, color=plots.GREY, lw=1, zorder=1)
    for y, text in ticks:
        ax.text(
            *(x + outwards * 0.03, y, text),
            ha=align,
            va="center",
            fontsize=8,
            zorder=4,
            bbox={"facecolor": "white", "alpha": 0.75, "edgecolor": "none", "pad": 0.8},
        )


def _separate(heights: np.ndarray, order: np.ndarray) -> None:
    """Spread out the lines that pass through the same value on an axis, with better ones lower."""
    for value in np.unique(heights):
        same = [trial for trial in order if heights[trial] == value]
        width = min(_MAX_SPREAD, 0.012 * (len(same) - 1))
        heights[same] = value + np.linspace(-width / 2, width / 2, len(same)) if width else value


def _smooth(heights: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """A curve through the heights at x = 0, 1, ... that is horizontal at each axis."""
    t = np.linspace(0, 1, 40)
    ease = t * t * (3 - 2 * t)
    x = np.concatenate([i + t for i in range(len(heights) - 1)])
    y = np.concatenate([a + (b - a) * ease for a, b in itertools.pairwise(heights)])
    return x, y
