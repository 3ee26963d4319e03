"""The tables of `compare`, from runs that are made up."""

import dataclasses

from rich.console import Console
from rich.table import Table

from folio.cli.run_tables import column_per_run, row_per_run
from folio.tracking.queries import TrackedRun


def run(name: str, loss: float | None, status: str = "FINISHED", **params: str) -> TrackedRun:
    return TrackedRun(
        id=f"{name}0123456789",
        folio_id="",
        name=name,
        experiment="",
        status=status,
        started=0,
        ended=3_723_000 if status == "FINISHED" else None,
        params={f"train.{key}": value for key, value in params.items()},
        metrics={} if loss is None else {"best_val_loss": loss, "steps": 3000.0},
        tags={},
    )


def lines(table: Table) -> list[list[str]]:
    console = Console(width=120, markup=False)
    with console.capture() as capture:
        console.print(table)
    return [line.split() for line in capture.get().splitlines()]


RUNS = [
    run("a", 4.5, seed="1", steps="9"),
    run("b", 4.25, seed="2", steps="9"),
    run("c", None, status="KILLED"),
]


def test_row_per_run_shows_losses_and_only_the_params_that_differ():
    rows = lines(row_per_run(RUNS))
    assert ["a", "4.5000", "-", "3,000", "-", "1:02:03", "seed=1"] in rows
    assert ["b", "4.2500", "-", "3,000", "-", "1:02:03", "seed=2"] in rows
    assert ["c", "(killed)", "-", "-", "-", "-", "-", "seed=-"] in rows


def test_column_per_run_shows_losses_and_only_the_params_that_differ():
    rows = lines(column_per_run(RUNS[:2]))
    assert ["validation", "loss", "4.5000", "4.2500"] in rows
    assert ["train.seed", "1", "2"] in rows
    assert not [row for row in rows if "train.steps" in row]


def test_params_of_evaluations_are_compared_among_evaluated_runs():
    evaluated = [
        dataclasses.replace(RUNS[0], params=RUNS[0].params | {"evaluate.stride": stride})
        for stride in ("1", "16")
    ]
    rows = lines(row_per_run([*evaluated, RUNS[1]]))
    strides = [word for row in rows for word in row if word.startswith("evaluate.")]
    assert strides == ["evaluate.stride=1", "evaluate.stride=16", "evaluate.stride=-"]
    assert not [row for row in lines(row_per_run([evaluated[0], RUNS[1]])) if "stride" in str(row)]
    assert ["evaluate.stride", "1", "16"] in lines(column_per_run(evaluated))
