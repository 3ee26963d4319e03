"""A picture of many settings at once: parallel coordinates, an axis a param, a line a training."""

import itertools
import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap, Normalize
from matplotlib.ticker import MaxNLocator

from folio import plots
from folio.sweeps.space import ACROSS, Point, label

_COLOURS = LinearSegmentedColormap.from_list("loss", [plots.BLUE, "#9fb8cc", "#dfe3e8"])
_FEW = 8  # values of a param up to which each is written beside its axis
_SPREAD = 0.05  # of an axis' height: how far apart lines through the same value may be


class Scale:
    """An axis: where a value is on it, from 0 at its foot to 1 at its head."""

    def __init__(self, values: Sequence[Any]):
        self.numbers = all(type(value) in (int, float) for value in values)
        # true, "fp32" and the like stand one above the other in their order in the sweep, and so do
        # numbers with null above them.
        some = [value for value in dict.fromkeys(values) if value is not None]
        ordered = sorted(some) if all(type(v) in (int, float) for v in some) else some
        self.known = ordered + [None] * (None in values)
        self.log = is_log(values)
        self.few = len(self.known) <= _FEW

    def at(self, value: Any) -> float:
        if not self.numbers:
            return self.known.index(value) / max(1, len(self.known) - 1)
        low, high, here = map(self._straight, (self.known[0], self.known[-1], value))
        return (here - low) / (high - low) if high > low else 0.5

    def ticks(self) -> list[tuple[float, str]]:
        if self.few:
            apart, values = 0.045, self.known
            places = [self.at(value) for value in values]
            kept = [i for i in range(len(values)) if i == 0 or places[i] - places[i - 1] > apart]
            return [(places[i], label(values[i])) for i in kept]
        low, high = self.known[0], self.known[-1]
        if self.log:
            powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
            steps = (1, 2, 5) if len(powers) < 5 else (1,)
            values = [step * 10.0**power for power in powers for step in steps]
        else:
            whole = all(type(value) is int for value in self.known)
            values = MaxNLocator(5, integer=whole).tick_values(low, high).tolist()
        return [(self.at(value), label(value)) for value in values if low <= value <= high]

    def _straight(self, value: float) -> float:
        return math.log(value) if self.log else value


def is_log(values: Sequence[Any]) -> bool:
    """Whether these values are to be seen by their logarithm: numbers across a power of ten, whose
    median is nearer to the middle of the logarithms than to that of the values."""
    if not all(type(value) in (int, float) for value in values) or min(values) <= 0:
        return False
    low, high, middle = min(values), max(values), statistics.median(values)
    return high >= ACROSS * low and middle - (low * high) ** 0.5 < (low + high) / 2 - middle


def draw(points: list[Point], losses: list[float], path: Path) -> None:
    """Write the picture as PNG: of points that vary the same params, with their held-out losses."""
    names = list(points[0])
    columns = [*([point[name] for point in points] for name in names), losses]
    scales = [Scale(column) for column in columns]
    scales[-1].few = False
    heights = np.array([[scale.at(v) for v in c] for scale, c in zip(scales, columns, strict=True)])
    order = np.argsort(losses)
    for row in heights[:-1]:
        _spread(row, order)
    figure, [ax] = plots.new_figure(inches=(max(7, 1.7 * (len(names) + 1)), 4.2))
    # What is far worse than most takes no colours from the others.
    middle, best = float(np.median(losses)), min(losses)
    worst = best + 3 * (middle - best) if middle > best else max(losses)
    shades = Normalize(best, min(worst, max(losses)))
    for place in order[::-1]:
        first = place == order[0]
        ax.plot(
            *_curve(heights[:, place]),
            color=plots.ORANGE if first else _COLOURS(shades(losses[place])),
            lw=2.6 if first else 1.3,
            zorder=3 if first else 2,
            solid_capstyle="round",
        )
    foot = heights[-1, order[0]]
    for x, scale in enumerate(scales[:-1]):
        _axis(ax, x, scale.ticks())
    _axis(ax, len(names), [tick for tick in scales[-1].ticks() if tick[0] - foot > 0.05], "left")
    ax.annotate(
        f"best {best:.3f}",
        (len(names), foot),
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
    ax.set_xticks(range(len(names) + 1), [*labels, "held-out loss,\nnats a token"])
    ax.set_yticks([])
    ax.set(xlim=(-0.35, len(names) + 0.55), ylim=(-0.05, 1.05))
    ax.set_title(f"Held-out loss of {len(points)} trainings, the best in orange")
    ax.spines[:].set_visible(False)
    ax.grid(visible=False)
    ax.tick_params(length=0)
    plots.save(figure, path)


def _axis(ax: Axes, x: int, ticks: list[tuple[float, str]], side: str = "right") -> None:
    """An axis at x; its texts end on it (right) or begin there (left)."""
    ax.plot([x, x], [0, 1], color=plots.GREY, lw=1, zorder=1)
    out = -1 if side == "right" else 1
    for height, text in ticks:
        ax.plot([x + out * 0.015, x], [height, height], color=plots.GREY, lw=1, zorder=1)
        ax.text(
            *(x + out * 0.03, height, text),
            ha=side,
            va="center",
            fontsize=8,
            zorder=4,
            bbox={"facecolor": "white", "alpha": 0.75, "edgecolor": "none", "pad": 0.8},
        )


def _spread(heights: np.ndarray, order: np.ndarray) -> None:
    """Move lines that pass through the same value apart, the better the lower."""
    for value in np.unique(heights):
        same = [place for place in order if heights[place] == value]
        width = min(_SPREAD, 0.012 * (len(same) - 1))
        for offset, place in zip(np.linspace(-width / 2, width / 2, len(same)), same, strict=True):
            heights[place] = value + offset if len(same) > 1 else value


def _curve(heights: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """A line through the heights at x = 0, 1, ..., level where it meets an axis."""
    t = np.linspace(0, 1, 40)
    ease = t * t * (3 - 2 * t)
    x = np.concatenate([i + t for i in range(len(heights) - 1)])
    y = np.concatenate([a + (b - a) * ease for a, b in itertools.pairwise(heights)])
    return x, y
