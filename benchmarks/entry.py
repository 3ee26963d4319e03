"""Measures an entry of LEADERBOARD.md: the models of a sweep over the seed.

    python -m folio sweep train.seed=1,2,3 --variant best-30m --name best --jobs 3
    python -m benchmarks.entry best

Prints a row for each model, and their mean, lowest and highest: the losses that `evaluate` stored,
the lowest validation loss of all evaluations during training with its step, and the validation
losses that benchmarks/check_entry.py finds without Folio, in separate windows and sliding by half a
context. All are in nats/token, on tinyshakespeare's validation text.
"""

import argparse
import json
import tempfile
from collections.abc import Iterator
from pathlib import Path
from statistics import mean

import transformers

from benchmarks import check_entry
from folio.corpus import shakespeare
from folio.errors import UserError, one_line_errors
from folio.run import HISTORY, TRAINING
from folio.sweeps.plan import Plan, read_plan
from folio.tracking.dvc_cache import DvcCache

MODEL, METRICS = Path("models/gpt2"), Path("models/evaluation/metrics.json")
HEAD = ["training", "validation", "sliding", "best", "at step", "checked", "sliding"]
WIDTHS = [max(8, len(name)) for name in HEAD]


def measure(folder: Path, text: Path, whole: bool = False) -> list[float]:
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
    losses = [metrics[name] for name in ("train_loss", "val_loss", "val_loss_sliding")]
    checked = [float(line.split()[-2]) for line in (separate, sliding)]
    return [*losses, best["val_loss"], best["step"], *checked]


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


def table(rows: dict[str, list[float]]) -> str:
    """A line for each row, and for their mean, lowest and highest."""
    columns = list(zip(*rows.values(), strict=True))
    summary = {
        name: [function(column) for column in columns]
        for name, function in (("mean", mean), ("lowest", min), ("highest", max))
    }
    lines = [" ".join([f"{'':<24}", *(f"{h:>{w}}" for h, w in zip(HEAD, WIDTHS, strict=True))])]
    for name, row in (rows | summary).items():
        cells = [
            f"{x:,.0f}" if title == "at step" else f"{x:.4f}"
            for title, x in zip(HEAD, row, strict=True)
        ]
        lines.append(
            " ".join([f"{name:<24}", *(f"{c:>{w}}" for c, w in zip(cells, WIDTHS, strict=True))])
        )
    return "\n".join(lines)


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
        found = restore(plan, Path(name))
        print(table({experiment: measure(folder, text) for experiment, folder in found}))


if __name__ == "__main__":
    with one_line_errors():
        main()
