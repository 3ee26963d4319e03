"""The pictures of training and evaluation, and the style of all pictures."""

import itertools
import warnings
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from folio import files

BLUE, ORANGE, GREY = "#2f6690", "#d1603d", "#8d99ae"


def new_figure(columns: int = 1, inches: tuple[float, float] = (7, 4)) -> tuple[Figure, list[Axes]]:
    """A figure in the house style and its axes, side by side."""
    # A Figure by itself draws with Agg: no window, and no pyplot that keeps figures alive.
    figure = Figure(figsize=inches, layout="constrained")
    axes = figure.subplots(1, columns, squeeze=False)[0].tolist()
    for each in axes:
        each.spines[["top", "right"]].set_visible(False)
        each.grid(alpha=0.25)
        each.set_axisbelow(True)
    return figure, axes


def save(figure: Figure, path: Path) -> None:
    """Write a PNG whole; its bytes depend on what it shows alone, not on the date."""
    with files.replacing(path) as temporary, warnings.catch_warnings():
        # A text's name may be in any script; what the font lacks is drawn as an empty box.
        warnings.filterwarnings("ignore", r"Glyph \d+ ", UserWarning)
        figure.savefig(temporary, dpi=150, metadata={"Software": None})


def loss_curve(history: list[dict[str, Any]], path: Path) -> None:
    """Training and held-out loss by step, with the best held-out loss marked.

    A row of step 0 is of the weights that were there before training.
    """
    train = [(row["step"], row["train_loss"]) for row in history if "train_loss" in row]
    held_out = [(row["step"], row["val_loss"]) for row in history if "val_loss" in row]
    figure, [ax] = new_figure()
    ax.plot(*zip(*train, strict=True), color=BLUE, label="training text")
    if held_out:
        ax.plot(*zip(*held_out, strict=True), color=ORANGE, marker="o", ms=3, label="held-out")
        if held_out[0][0] == 0:
            label = f"held-out before training, {held_out[0][1]:.3f}"
            ax.axhline(held_out[0][1], color=ORANGE, lw=0.8, ls="--", label=label)
        step, best = min(held_out, key=lambda point: point[1])
        ax.axhline(best, color=GREY, lw=0.8, ls=":")
        ax.annotate(
            f"best {best:.3f} at step {step:,}",
            (step, best),
            xytext=(0, 10),
            textcoords="offset points",
            ha="right" if step > held_out[-1][0] / 2 else "left",
            color=ORANGE,
        )
    ax.set(title="Loss by step", xlabel="step", ylabel="loss, nats a token")
    ax.legend(frameon=False)
    save(figure, path)


def loss_by_position(losses: np.ndarray, context: int, path: Path) -> None:
    """Held-out loss by how many tokens the model was given, from losses [N] window after window."""
    whole = len(losses) // context * context
    mean = losses[:whole].reshape(-1, context).mean(0) if whole else losses
    figure, [ax] = new_figure()
    given = np.arange(1, len(mean) + 1)
    ax.plot(given, mean, color=GREY, lw=0.8, label="each position")
    width = max(1, len(mean) // 8)
    smooth = np.convolve(mean, np.ones(width) / width, "valid")
    ax.plot(given[width - 1 :], smooth, color=BLUE, label=f"mean of {width}")
    ax.set(
        title="Held-out loss by context",
        xlabel="tokens the model was given",
        ylabel="loss, nats a token",
    )
    ax.legend(frameon=False)
    save(figure, path)


def loss_by_rarity(
    losses: np.ndarray, targets: np.ndarray, train_tokens: np.ndarray, path: Path
) -> None:
    """Held-out loss by how often the token occurs in the training text."""
    seen = np.bincount(train_tokens, minlength=int(targets.max()) + 1)[targets]
    edges = [0, 1, 10, 100, 1_000, 10_000, np.inf]
    names = ["never", "1-9", "10-99", "100-999", "1,000-9,999", "10,000+"]
    groups = [(seen >= low) & (seen < high) for low, high in itertools.pairwise(edges)]
    present = [
        (n, g.mean(), losses[g].mean()) for n, g in zip(names, groups, strict=True) if g.any()
    ]
    figure, [ax] = new_figure()
    for place, (_, share, loss) in enumerate(present):
        ax.bar(place, loss, color=BLUE, width=0.8)
        ax.annotate(
            f"{loss:.2f}\n{share:.1%} of tokens",
            (place, loss),
            xytext=(0, 3),
            textcoords="offset points",
            ha="center",
            fontsize=8,
        )
    ax.set_xticks(range(len(present)), [name for name, *_ in present])
    ax.set(
        title="Held-out loss by rarity",
        xlabel="times the token occurs in the training text",
        ylabel="loss, nats a token",
    )
    ax.margins(y=0.15)
    save(figure, path)
