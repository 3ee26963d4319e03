"""Shows how the variants that memorise their training text do so, from MLflow's data.

    python -m benchmarks.memorize

Prints the training and validation loss by step of the newest finished run of each of the variants
one-batch, memorize and memorize-124m, beside the write-up's, and draws both curves into
docs/memorize.png. `make variant NAME=one-batch` trains one. The training losses by step are means
since the row before, with dropout; the one of the whole text is that of evaluate.
"""

import argparse
import math
from pathlib import Path
from typing import Any

from benchmarks import tracked
from folio import plots
from folio.errors import UserError, one_line_errors
from folio.sweeps import variants
from folio.tracking import failures, queries
from folio.tracking.queries import TrackedRun

NAMES = ("one-batch", "memorize", "memorize-124m")
PICTURE = Path("docs/memorize.png")
UNIFORM = math.log(50_257)
ROWS = 12  # of a table, at most
ROW = "{:>8} {:>14} {:>16}"

History = list[dict[str, Any]]


def find(name: str, runs: list[TrackedRun]) -> TrackedRun | None:
    """The first finished run with the params of a variant, and any seed."""
    values = tracked.resolve(variants.read(name))
    for run in runs:
        if run.status == "FINISHED" and tracked.has_params(run, values, any_seed=True):
            return run
    return None


def table(name: str, run: TrackedRun, rows: History) -> str:
    """Both losses at some of the evaluations, the best and the last among them."""
    evaluations = [row for row in rows if "val_loss" in row and "train_loss" in row]
    every = math.ceil(len(evaluations) / ROWS)
    best = min(evaluations, key=lambda row: row["val_loss"])
    shown = evaluations[::-every]  # the last one included
    shown = sorted([*shown, *([] if best in shown else [best])], key=lambda row: row["step"])
    seconds = ((run.ended or run.started) - run.started) / 1000
    lines = [
        f"{name}: {run.metrics['parameters'] / 1e6:.1f} M parameters, {run.tags['device']},"
        f" {seconds:.0f} s",
        ROW.format("step", "training loss", "validation loss"),
    ]
    lines += [
        ROW.format(f"{row['step']:,}", f"{row['train_loss']:.4f}", f"{row['val_loss']:.3f}")
        + ("  best" if row is best else "")
        for row in shown
    ]
    if "evaluate/train_loss" in run.metrics:
        measured = run.metrics["evaluate/train_loss"]
        lines.append(
            f"evaluate: {measured:.4f} on {run.metrics['evaluate/train_tokens']:,.0f} tokens of the"
            f" training text, {run.metrics['evaluate/val_loss']:.4f} on the validation text"
        )
    return "\n".join(lines)


def draw(found: dict[str, History], path: Path) -> None:
    """Draw both curves of each run, side by side, with their last values."""
    figure, axes = plots.new_figure(len(found), (4.5 * len(found) + 1, 4))
    curves = (("val_loss", plots.ORANGE, "validation"), ("train_loss", plots.BLUE, "training"))
    for ax, (name, rows) in zip(axes, found.items(), strict=True):
        ax.axhline(UNIFORM, color=plots.GREY, lw=0.8, ls="--", label="all tokens equally likely")
        for key, color, label in curves:
            points = [(row["step"], row[key]) for row in rows if key in row]
            ax.plot(*zip(*points, strict=True), color=color, lw=1.5, label=label)
            last = f"{points[-1][1]:.2g}" if points[-1][1] < 1 else f"{points[-1][1]:.1f}"
            ax.annotate(
                *(last, points[-1], (0, 6 if key == "train_loss" else -14)),
                textcoords="offset points",
                ha="right",
                color=color,
                fontweight="bold",
            )
        top = 1.1 * max(UNIFORM, *(row.get("val_loss", 0.0) for row in rows))
        ax.set(title=name, xlabel="step", ylim=(0, top))
    axes[0].set_ylabel("loss (nats/token)")
    axes[0].legend(frameon=False, loc="center right")
    plots.save(figure, path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--stores", nargs="+", metavar="URI", help="default: the project's store")
    runs = tracked.list_runs(tracked.open_stores(parser.parse_args().stores))
    store_of = {run.id: store for run, store in runs}
    found: dict[str, History] = {}
    for name in NAMES:
        run = find(name, [run for run, _ in runs])
        if run is None:
            print(f"{name}: no finished run in MLflow: make variant NAME={name}\n")
            continue
        store = store_of[run.id]
        with tracked.reading(store.uri, failures.without_password(store.uri)):
            found[name] = queries.loss_history(store, run.id)
        print(table(name, run, found[name]), end="\n\n")
    if not found:
        raise UserError("MLflow has no run of these variants")
    print(
        f"the write-up's log: training loss 0.0007, validation loss 11; {UNIFORM:.1f} is ln 50,257"
    )
    draw(found, PICTURE)
    print(f"drawn: {PICTURE}")


if __name__ == "__main__":
    with one_line_errors():
        main()
