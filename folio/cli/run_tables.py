"""Tables of MLflow runs for the terminal."""

import math
import time

from rich import box
from rich.table import Table
from rich.text import Text

from folio.tracking.queries import EVALUATE, TrackedRun

_METRICS = {  # metric: (title, format)
    "kept_val_loss": ("validation loss", "{:.4f}"),
    "evaluate/val_loss_sliding": ("... sliding window", "{:.4f}"),
    "last_train_loss": ("training loss", "{:.4f}"),
    "best_val_loss": ("best evaluation", "{:.4f}"),
    "best_step": ("... at step", "{:,.0f}"),
    "steps": ("steps", "{:,.0f}"),
    "parameters": ("parameters", "{:,.0f}"),
    "median_tokens_per_second": ("tokens/s", "{:,.0f}"),
}
# Prefixes of the params to compare. Those of the evaluation are in the run's tags, and those of
# prepare among the facts about the data.
_DATA = ("corpus", "training_fraction", "segmentations", "bpe_dropout")
_PARAMS = ("model.", "train.", *(f"data.{name}" for name in _DATA), EVALUATE)


_WIDE = 110  # characters; in a narrower terminal, the params of a run are below its name
_COLUMN = 16  # the least width of a run's column: that of the time when it started


def row_per_run(runs: list[TrackedRun], width: int) -> Table:
    """A table with a row per run, for a terminal with this width in characters."""
    differing = _differing_params(runs)
    metrics = ["kept_val_loss", "last_train_loss", "steps"]
    titles = ["validation\nloss", "training\nloss", "steps"]
    if width >= _WIDE:
        metrics, titles = [*metrics, "median_tokens_per_second"], [*titles, "tokens/s"]
        table = new_table("run", *titles, "duration")
        table.add_column("differing params", overflow="fold")
    else:
        table = new_table(*titles, "duration")
        table.add_column("run", overflow="fold")
    for run in runs:
        numbers = [*(_metric(run, metric) for metric in metrics), _duration(run)]
        params = " ".join(f"{_short(key)}={run.params.get(key, '-')}" for key in differing)
        if width >= _WIDE:
            table.add_row(_name(run), *numbers, params)
        else:
            table.add_row(
                *numbers, Text.assemble(_name(run), "\n" if params else "", (params, "dim"))
            )
    return table


def column_per_run(runs: list[TrackedRun], width: int) -> list[Table]:
    """Tables with a column per run, as many as needed for a terminal with this width."""
    differing = _differing_params(runs)
    titles = [*(title for title, _ in _METRICS.values()), *differing]
    count = max(1, (width - max(map(len, titles))) // (_COLUMN + 2))
    return [
        _columns(runs[first : first + count], differing) for first in range(0, len(runs), count)
    ]


def _columns(runs: list[TrackedRun], params: list[str]) -> Table:
    table = new_table("", *map(_name, runs))
    for metric, (title, _) in _METRICS.items():
        table.add_row(title, *(_metric(run, metric) for run in runs))
    table.add_row("duration", *map(_duration, runs))
    table.add_row("started", *map(_start, runs))
    table.add_row("MLflow id", *(run.id[:8] for run in runs), end_section=True)
    for key in params:
        table.add_row(key, *(run.params.get(key, "-") for run in runs))
    return table


def new_table(*titles: str) -> Table:
    """A table with a left-aligned first column and right-aligned others."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for number, title in enumerate(titles):
        table.add_column(title, justify="right" if number else "left", overflow="fold")
    return table


def _differing_params(runs: list[TrackedRun]) -> list[str]:
    """The names of the params whose values are not the same in all runs that have such params."""
    keys = sorted({key for run in runs for key in run.params if key.startswith(_PARAMS)})
    differing = []
    for key in keys:
        evaluate = key.startswith(EVALUATE)
        # A run that was killed immediately has no params, and one that has not been evaluated has
        # no evaluation params.
        compared = [run for run in runs if _has_params(run, evaluate)]
        if len({run.params.get(key) for run in compared}) > 1:
            differing.append(key)
    return differing


def _has_params(run: TrackedRun, evaluate: bool) -> bool:
    """Whether a run has evaluation params, or training params if `evaluate` is false."""
    return any(key.startswith(EVALUATE) == evaluate for key in run.params)


def _short(key: str) -> str:
    return key if key.startswith(EVALUATE) else key.partition(".")[2]


def _name(run: TrackedRun) -> str:
    return run.name if run.status == "FINISHED" else f"{run.name} ({run.status.lower()})"


def _metric(run: TrackedRun, metric: str) -> str:
    _, form = _METRICS[metric]
    value = run.loss if metric == "kept_val_loss" else run.metrics.get(metric, math.inf)
    return form.format(value) if math.isfinite(value) else "-"


def _duration(run: TrackedRun) -> str:
    if run.ended is None:
        return "-"
    minutes, seconds = divmod((run.ended - run.started) // 1000, 60)
    return f"{minutes // 60}:{minutes % 60:02}:{seconds:02}"


def _start(run: TrackedRun) -> str:
    return time.strftime("%Y-%m-%d %H:%M", time.localtime(run.started / 1000))
