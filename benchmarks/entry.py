"""Measures an entry of LEADERBOARD.md: the models of a sweep over the seed.

    python -m folio sweep train.seed=1,2,3 --variant best-30m --name best --jobs 3
    python -m benchmarks.entry best

Prints a row for each model, and their mean, lowest and highest: the losses that `evaluate` stored,
the lowest validation loss of all evaluations during training with its step, and the validation
losses that the script benchmarks/check_entry.py finds without Folio, in separate windows and
sliding by half a context. All are in nats/token, on tinyshakespeare's validation text. The last
line is the row of the table in LEADERBOARD.md.
"""

import argparse
import json
import math
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pandas as pd
import safetensors
import transformers

from benchmarks import check_entry, recipe
from folio.corpus import shakespeare
from folio.errors import UserError, one_line_errors
from folio.run import HISTORY, TRAINING
from folio.sweeps.plan import Plan, read_plan
from folio.tracking.dvc_cache import DvcCache

MODEL, METRICS = Path("models/gpt2"), Path("models/evaluation/metrics.json")
TOKEN_CHARACTERS = 111_540 / 36_059  # of the validation text


def measure(folder: Path, text: Path, whole: bool = False) -> dict[str, float]:
    """The figures of a row, for a folder that contains the models folder of a training.

    text, whole: see check_entry.check. Raises UserError if the model is not that of an entry.
    """
    metrics = json.loads((folder / METRICS).read_text())
    rows = [json.loads(line) for line in (folder / TRAINING / HISTORY).open()]
    best = min((row for row in rows if "val_loss" in row), key=lambda row: row["val_loss"])
    try:
        *_, separate, sliding = check_entry.check(folder / MODEL, text, None, whole).splitlines()
    except check_entry.EntryError as problem:
        raise UserError(str(problem)) from None
    return {
        "training": metrics["train_loss"],
        "validation": metrics["val_loss"],
        "sliding": metrics["val_loss_sliding"],
        "best": best["val_loss"],
        "at step": best["step"],
        "script": float(separate.split()[-2]),
        "script, sliding": float(sliding.split()[-2]),
    }


def restore(plan: Plan, folder: Path) -> Iterator[tuple[str, Path]]:
    """Copy what each finished trial has made to a folder; yield the trial's name and the folder."""
    cache = DvcCache(Path.cwd())
    for experiment, commit in plan.finished().items():
        outs = cache.outs(commit)
        wanted = (MODEL, METRICS, TRAINING / HISTORY)
        found = {path: outs[path] for path in map(Path.as_posix, wanted) if path in outs}
        if len(found) < len(wanted):
            raise UserError(f"{experiment} has no model with its history and metrics")
        cache.copy(found, folder / experiment)
        yield experiment, folder / experiment


def table(rows: dict[str, dict[str, float]]) -> str:
    """A line for each row, and for their mean, lowest and highest."""
    frame = pd.DataFrame.from_dict(rows, orient="index")
    summary = frame.agg(["mean", "min", "max"])
    steps = {"at step": "{:,.0f}".format}
    return pd.concat([frame, summary]).to_string(float_format="{:.4f}".format, formatters=steps)


def count_parameters(model: Path) -> int:
    with safetensors.safe_open(model / "model.safetensors", "pt") as weights:
        names = weights.keys()
        return sum(math.prod(weights.get_slice(name).get_shape()) for name in names)


def leaderboard_row(plan: Plan, rows: dict[str, dict[str, float]], parameters: int) -> str:
    """The row of the table in LEADERBOARD.md. The losses are in nats/token."""
    tree = recipe.apply(plan.base | next(iter(plan.trials.values())))
    model, train = tree["model"], tree["train"]
    tokens = train["batch_size"] * train["accumulation"] * model["block_size"]
    frame = pd.DataFrame.from_dict(rows, orient="index")
    loss, mean = frame["script"], frame.mean()
    return (
        f"| `{plan.name}` | {parameters / 1e6:.1f} M | {train['steps']:,} x {tokens:,}"
        f" | {mean['training']:.3f} | {loss.mean():.3f} ({loss.min():.3f} to {loss.max():.3f})"
        f" | {mean['script, sliding']:.3f} | {loss.mean() / TOKEN_CHARACTERS:.3f} |"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("sweep", help="the name of a sweep in sweeps/")
    options = parser.parse_args()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    plan = read_plan(options.sweep)
    if not plan.finished():
        raise UserError(f"no trial of {plan.name} has finished")
    with tempfile.TemporaryDirectory() as name:
        text = Path(name, "tinyshakespeare.txt")
        text.write_text(shakespeare.load_tinyshakespeare()[0], encoding="utf-8")
        rows = {trial: measure(folder, text) for trial, folder in restore(plan, Path(name))}
        size = count_parameters(Path(name, next(iter(rows)), MODEL))
    print(table(rows), leaderboard_row(plan, rows, size), sep="\n\n")


if __name__ == "__main__":
    with one_line_errors():
        main()
