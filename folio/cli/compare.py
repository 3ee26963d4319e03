"""Runs side by side in the terminal."""

import time

from rich import box
from rich.console import Console
from rich.table import Table

from folio.errors import UserError
from folio.tracking.queries import TrackedRun, find_run, list_runs
from folio.tracking.store import Store

# What is shown of each run: (title, metric, format).
_FIGURES = (
    ("held-out loss", "best_val_loss", "{:.4f}"),
    ("... sliding window", "evaluate/val_loss_sliding", "{:.4f}"),
    ("training loss", "last_train_loss", "{:.4f}"),
    ("best at step", "best_step", "{:,.0f}"),
    ("steps", "steps", "{:,.0f}"),
    ("parameters", "parameters", "{:,.0f}"),
    ("tokens/s", "median_tokens_per_second", "{:,.0f}"),
)
_FORMATS = {metric: form for _, metric, form in _FIGURES}
_SECTIONS = ("prepare.", "model.", "train.", "data.corpus")


def table(store: Store, names: list[str], best: int) -> None:
    """Print the named runs in columns; or else, a row each, the best of all.

    Raises UserError where a name names no run, or there is none at all.
    """
    runs = [find_run(store, name) for name in names] or list_runs(store)
    if not runs:
        raise UserError("MLflow has no run yet: `dvc repro` makes the first")
    console = Console(markup=False, emoji=False, highlight=False)  # names are anybody's
    if names:
        console.print(_columns(runs))
    else:
        runs.sort(key=lambda run: (run.loss, -run.started))
        console.print(_rows(runs[:best]))
        if len(runs) > best:
            console.print(f"{len(runs) - best} more: --best {len(runs)} shows all")
    if len({run.tags.get("held_out_digest") for run in runs}) > 1:
        console.print("Their held-out texts differ, so not all of these losses compare.")


def _rows(runs: list[TrackedRun]) -> Table:
    shown = _table("run", "held-out", "training", "step", "tokens/s", "took")
    shown.add_column("what differs", overflow="fold")
    differing = _differing(runs)
    for run in runs:
        cells = [_cell(run, title) for title in ("best_val_loss", "last_train_loss", "steps")]
        speed = _cell(run, "median_tokens_per_second")
        what = " ".join(f"{_short(key)}={run.params.get(key, '-')}" for key in differing)
        shown.add_row(_name(run), *cells, speed, _took(run), what)
    return shown


def _columns(runs: list[TrackedRun]) -> Table:
    shown = _table("", *(_name(run) for run in runs))
    for title, metric, _ in _FIGURES:
        shown.add_row(title, *(_cell(run, metric) for run in runs))
    shown.add_row("took", *map(_took, runs))
    shown.add_row("started", *(_date(run) for run in runs))
    shown.add_row("MLflow's id", *(run.id[:8] for run in runs), end_section=True)
    for key in _differing(runs):
        shown.add_row(key, *(run.params.get(key, "-") for run in runs))
    return shown


def _table(*titles: str) -> Table:
    shown = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for number, title in enumerate(titles):
        shown.add_column(title, justify="right" if number else "left", no_wrap=not number)
    return shown


def _differing(runs: list[TrackedRun]) -> list[str]:
    """The params that are not the same in all of them."""
    runs = [run for run in runs if run.params]  # one that was killed at once has none
    keys = sorted({key for run in runs for key in run.params if key.startswith(_SECTIONS)})
    return [key for key in keys if len({run.params.get(key) for run in runs}) > 1]


def _short(key: str) -> str:
    return key.partition(".")[2]


def _name(run: TrackedRun) -> str:
    return run.name if run.status == "FINISHED" else f"{run.name} ({run.status.lower()})"


def _cell(run: TrackedRun, metric: str) -> str:
    if metric not in run.metrics:
        return "-"
    return _FORMATS[metric].format(run.metrics[metric])


def _took(run: TrackedRun) -> str:
    if run.ended is None:
        return "-"
    minutes, seconds = divmod((run.ended - run.started) // 1000, 60)
    return f"{minutes // 60}:{minutes % 60:02}:{seconds:02}"


def _date(run: TrackedRun) -> str:
    return time.strftime("%Y-%m-%d %H:%M", time.localtime(run.started / 1000))
