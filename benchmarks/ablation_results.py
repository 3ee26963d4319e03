"""The tables and the picture of benchmarks/ablation.py."""

from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import Any

from matplotlib.axes import Axes
from matplotlib.ticker import FixedLocator, NullFormatter, NullLocator

from folio import plots
from folio.sweeps import markdown
from folio.tracking.queries import TrackedRun

ALL_ON = "all on"
LAST, BEST = "last_val_loss", "best_val_loss"  # of the evaluations during training
SLIDING, TRAINING = "evaluate/val_loss_sliding", "evaluate/train_loss"
METRICS = {LAST, BEST, SLIDING, TRAINING}  # all of them are those of a run in a Result


@dataclass(frozen=True)
class Result:
    """The runs of a setting that MLflow has, one for each seed."""

    name: str
    runs: list[TrackedRun]

    def of(self, metric: str) -> list[float]:
        return [run.metrics[metric] for run in self.runs]

    @property
    def loss(self) -> float:
        return mean(self.of(LAST))

    @property
    def tokens(self) -> int:
        return int(self.runs[0].params["data.train_tokens"])


def options_table(results: list[Result]) -> str:
    """The most valuable option first, after `all on`, which must be among the results."""
    base, others = split(results)
    rows = [
        [result.name, *_cells(result), f"{result.loss - base.loss:+.3f}", *_more(result)]
        for result in [base, *others]
    ]
    return markdown.table(["off", "val loss", "of seeds", "change", "sliding", "training"], rows)


def curve_table(results: list[Result]) -> str:
    rows = [
        [result.name, f"{result.tokens:,}", *_cells(result), _mean(result, BEST)] + _more(result)
        for result in results
    ]
    header = ["text", "tokens", "val loss", "of seeds", "lowest", "sliding", "training"]
    return markdown.table(header, rows)


def split(results: list[Result]) -> tuple[Result, list[Result]]:
    """`all on`, and the others from the highest loss to the lowest."""
    [base] = [result for result in results if result.name == ALL_ON]
    others = [result for result in results if result is not base]
    return base, sorted(others, key=lambda result: -result.loss)


def draw(options: list[Result], curve: list[Result], path: Path) -> None:
    """Draw both parts side by side, or the one that has results."""
    count = bool(options) + bool(curve)
    figure, axes = plots.new_figure(count, (5.5 * count, 4))
    if options:
        draw_options(axes[0], options)
    if curve:
        draw_curve(axes[-1], curve)
    plots.save(figure, path)


def draw_options(ax: Axes, results: list[Result]) -> None:
    """A row for each option: the losses without it, their mean, and the change."""
    base, others = split(results)
    rows = [*others, base]
    losses = [loss for result in rows for loss in result.of(LAST)]
    width = max(losses) - min(losses) or 1.0
    ax.axvspan(min(base.of(LAST)), max(base.of(LAST)), color=plots.GREY, alpha=0.2, lw=0)
    ax.axvline(base.loss, color=plots.GREY, lw=0.8, ls="--")
    for row, result in enumerate(rows):
        found, color = result.of(LAST), plots.ORANGE if result is base else plots.BLUE
        ax.plot([min(found), max(found)], [row, row], color=color, lw=1.5)
        ax.plot(found, [row] * len(found), "o", ms=4, color=color, alpha=0.5, mew=0)
        ax.plot([result.loss], [row], "|", ms=12, mew=2, color=color)
        text = f"{result.loss:.3f}" if result is base else f"{result.loss - base.loss:+.3f}"
        ax.annotate(
            text,
            (max(losses) + 0.06 * width, row),
            va="center",
            color=color,
            fontsize=9,
            annotation_clip=False,
        )
    ax.set_yticks(range(len(rows)), [label(result.name) for result in rows])
    ax.set_xlim(min(losses) - 0.05 * width, max(losses) + 0.28 * width)
    ax.set_ylim(len(rows) - 0.5, -0.5)
    ax.grid(visible=False, axis="y")
    ax.set(title="Each option alone off", xlabel="validation loss of the last step (nats/token)")


def draw_curve(ax: Axes, results: list[Result]) -> None:
    """The validation loss by the number of training tokens, which is on a log scale."""
    rows = sorted(results, key=lambda result: result.tokens)
    tokens = [result.tokens for result in rows]
    above: dict[str, Any] = {"xytext": (5, 4), "ha": "left", "va": "bottom"}
    below: dict[str, Any] = {"xytext": (-4, -5), "ha": "right", "va": "top"}
    curves = (
        (LAST, plots.ORANGE, "o-", "last step", above),
        (BEST, plots.GREY, "s--", "lowest of the evaluations", below),
    )
    for metric, color, style, label, place in curves:
        means = [mean(result.of(metric)) for result in rows]
        ax.plot(tokens, means, style, ms=4, lw=1.5, color=color, label=label)
        low, high = ([of(result.of(metric)) for result in rows] for of in (min, max))
        ax.fill_between(tokens, low, high, color=color, alpha=0.2, lw=0)
        for point in zip(tokens, means, strict=True):
            ax.annotate(
                *(f"{point[1]:.2f}", point),
                textcoords="offset points",
                color=color,
                fontsize=9,
                **place,
            )
    ax.set_xscale("log")
    ax.xaxis.set_major_locator(FixedLocator(tokens))
    ax.xaxis.set_minor_locator(NullLocator())
    ax.xaxis.set_minor_formatter(NullFormatter())
    ax.set_xticks(
        tokens, [f"{count:,}\n{result.name}" for count, result in zip(tokens, rows, strict=True)]
    )
    ax.margins(x=0.12, y=0.15)
    ax.legend(frameon=False)
    ax.set(
        title="Loss by amount of training text",
        xlabel="training tokens",
        ylabel="validation loss (nats/token)",
    )


def label(name: str) -> str:
    return name if name == ALL_ON else f"no {name}"


def _cells(result: Result) -> list[str]:
    losses = result.of(LAST)
    return [f"{result.loss:.3f}", f"{min(losses):.3f}..{max(losses):.3f}"]


def _more(result: Result) -> list[str]:
    return [_mean(result, metric) for metric in (SLIDING, TRAINING)]


def _mean(result: Result, metric: str) -> str:
    return f"{mean(result.of(metric)):.3f}"
