"""The plots of training and evaluation, and the common style of all plots."""

import itertools
import warnings
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from folio import files

BLUE, ORANGE, GREY = "#2f6690", "#d1603d", "#8d99ae"
_LOSS_LABEL = "loss (nats/token)"


def new_figure(columns: int = 1, inches: tuple[float, float] = (7, 4)) -> tuple[Figure, list[Axes]]:
    """Return a figure in the common style, and its axes from left to right."""
    # A Figure created without pyplot renders with Agg: it opens no window and is not kept alive.
    figure = Figure(figsize=inches, layout="constrained")
    axes = figure.subplots(1, columns, squeeze=False)[0].tolist()
    for ax in axes:
        ax.spines[["top", "right"]].set_visible(False)
        ax.grid(alpha=0.25)
        ax.set_axisbelow(True)
    return figure, axes


def save(figure: Figure, path: Path) -> None:
    """Write a PNG file atomically. Its bytes depend only on the figure: it contains no date."""
    with files.replacing(path) as temporary, warnings.catch_warnings():
        # A title may contain any script; characters without a glyph are drawn as empty boxes.
        warnings.filterwarnings("ignore", r"Glyph \d+ ", UserWarning)
        figure.savefig(temporary, dpi=150, metadata={"Software": None})


def loss_curve(history: list[dict[str, Any]], path: Path) -> None:
    """Plot training and validation loss by step, and mark the best validation loss.

    `history` contains the rows of history.jsonl. A validation loss at step 0 belongs to the initial
    weights.
    """
    train = [(row["step"], row["train_loss"]) for row in history if "train_loss" in row]
    val = [(row["step"], row["val_loss"]) for row in history if "val_loss" in row]
    figure, [ax] = new_figure()
    ax.plot(*zip(*train, strict=True), color=BLUE, label="training")
    if val:
        ax.plot(*zip(*val, strict=True), color=ORANGE, marker="o", ms=3, label="validation")
        if val[0][0] == 0:
            label = f"validation before training, {val[0][1]:.3f}"
            ax.axhline(val[0][1], color=ORANGE, lw=0.8, ls="--", label=label)
        best_step, best_loss = min(val, key=lambda point: point[1])
        ax.axhline(best_loss, color=GREY, lw=0.8, ls=":")
        ax.annotate(
            f"best {best_loss:.3f} at step {best_step:,}",
            (best_step, best_loss),
            xytext=(0, 10),
            textcoords="offset points",
            ha="right" if best_step > val[-1][0] / 2 else "left",
            color=ORANGE,
        )
    ax.set(title="Loss by step", xlabel="step", ylabel=_LOSS_LABEL)
    ax.legend(frameon=False)
    save(figure, path)


def loss_by_position(losses: np.ndarray, context: int, path: Path) -> None:
    """Plot validation loss by the number of preceding tokens in the window.

    `losses`, [N], contains the losses of consecutive windows of `context` tokens each.
    """
    complete = len(losses) // context * context
    mean = losses[:complete].reshape(-1, context).mean(0) if complete else losses
    figure, [ax] = new_figure()
    preceding = np.arange(1, len(mean) + 1)
    ax.plot(preceding, mean, color=GREY, lw=0.8, label="each position")
    width = max(1, len(mean) // 8)
    moving_average = np.convolve(mean, np.ones(width) / width, "valid")
    ax.plot(
        preceding[width - 1 :], moving_average, color=BLUE, label=f"moving average over {width}"
    )
    ax.set(
        title="Validation loss by context length",
        xlabel="preceding tokens in the window",
        ylabel=_LOSS_LABEL,
    )
    ax.legend(frameon=False)
    save(figure, path)


def loss_by_rarity(
    losses: np.ndarray, targets: np.ndarray, train_counts: np.ndarray, path: Path
) -> None:
    """Plot validation loss by how often the target token occurs in the training text.

    `losses` and `targets` are [N]; `train_counts`, [vocabulary], is how often each id occurs there.
    """
    occurrences = train_counts[targets]
    edges = [0, 1, 10, 100, 1_000, 10_000, np.inf]
    names = ["never", "1-9", "10-99", "100-999", "1,000-9,999", "10,000+"]
    groups = [
        (occurrences >= low) & (occurrences < high) for low, high in itertools.pairwise(edges)
    ]
    bars = [
        (name, group.mean(), losses[group].mean())
        for name, group in zip(names, groups, strict=True)
        if group.any()
    ]
    figure, [ax] = new_figure()
    for index, (_, share, loss) in enumerate(bars):
        ax.bar(index, loss, color=BLUE, width=0.8)
        ax.annotate(
            f"{loss:.2f}\n{share:.1%} of tokens",
            (index, loss),
            xytext=(0, 3),
            textcoords="offset points",
            ha="center",
            fontsize=8,
        )
    ax.set_xticks(range(len(bars)), [name for name, *_ in bars])
    ax.set(
        title="Validation loss by token frequency",
        xlabel="occurrences of the token in the training text",
        ylabel=_LOSS_LABEL,
    )
    ax.margins(y=0.15)
    save(figure, path)
