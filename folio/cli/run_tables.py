"""Tables of MLflow runs for the terminal."""

import time

from rich import box
from rich.table import Table

from folio.tracking.queries import EVALUATE, TrackedRun

_METRICS = {  # metric: (title, format)
    "best_val_loss": ("validation loss", "{:.4f}"),
    "evaluate/val_loss_sliding": ("... sliding window", "{:.4f}"),
    "last_train_loss": ("training loss", "{:.4f}"),
    "best_step": ("best step", "{:,.0f}"),
    "steps": ("steps", "{:,.0f}"),
    "parameters": ("parameters", "{:,.0f}"),
    "median_tokens_per_second": ("tokens/s", "{:,.0f}"),
}
# Prefixes of the params to compare. Those of the evaluation are in the run's tags.
_PARAMS = ("prepare.", "model.", "train.", "data.corpus", EVALUATE)


def row_per_run(runs: list[TrackedRun]) -> Table:
    table = _new_table("run", "val loss", "train loss", "steps", "tokens/s", "duration")
    table.add_column("differing params", overflow="fold")
    metrics = ("best_val_loss", "last_train_loss", "steps", "median_tokens_per_second")
    differing = _differing_params(runs)
    for run in runs:
        cells = [_metric(run, metric) for metric in metrics]
        params = " ".join(f"{_short(key)}={run.params.get(key, '-')}" for key in differing)
        table.add_row(_name(run), *cells, _duration(run), params)
    return table


def column_per_run(runs: list[TrackedRun]) -> Table:
    table = _new_table("", *map(_name, runs))
    for metric, (title, _) in _METRICS.items():
        table.add_row(title, *(_metric(run, metric) for run in runs))
    table.add_row("duration", *map(_duration, runs))
    table.add_row("started", *map(_start, runs))
    table.add_row("MLflow id", *(run.id[:8] for run in runs), end_section=True)
    for key in _differing_params(runs):
        table.add_row(key, *(run.params.get(key, "-") for run in runs))
    return table


def _new_table(*titles: str) -> Table:
    """A table with a left-aligned first column and right-aligned others."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for number, title in enumerate(titles):
        table.add_column(title, justify="right" if number else "left", no_wrap=not number)
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
    return form.format(run.metrics[metric]) if metric in run.metrics else "-"


def _duration(run: TrackedRun) -> str:
    if run.ended is None:
        return "-"
    minutes, seconds = divmod((run.ended - run.started) // 1000, 60)
    return f"{minutes // 60}:{minutes % 60:02}:{seconds:02}"


def _start(run: TrackedRun) -> str:
    return time.strftime("%Y-%m-%d %H:%M", time.localtime(run.started / 1000))
