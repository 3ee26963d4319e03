"""The tables of `compare`, from runs that are made up."""

import dataclasses

import pytest
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


def text(*tables: Table, width: int) -> str:
    console = Console(width=width, markup=False)
    with console.capture() as capture:
        console.print(*tables)
    return capture.get()


def lines(*tables: Table) -> list[list[str]]:
    return [line.split() for line in text(*tables, width=120).splitlines()]


RUNS = [
    run("a", 4.5, seed="1", steps="9"),
    run("b", 4.25, seed="2", steps="9"),
    run("c", None, status="KILLED"),
]


def test_row_per_run_shows_losses_and_only_the_params_that_differ():
    rows = lines(row_per_run(RUNS, 120))
    assert ["a", "4.5000", "-", "3,000", "-", "1:02:03", "seed=1"] in rows
    assert ["b", "4.2500", "-", "3,000", "-", "1:02:03", "seed=2"] in rows
    assert ["c", "(killed)", "-", "-", "-", "-", "-", "seed=-"] in rows


def test_column_per_run_shows_losses_and_only_the_params_that_differ():
    rows = lines(*column_per_run(RUNS[:2], 120))
    assert ["validation", "loss", "4.5000", "4.2500"] in rows
    assert ["train.seed", "1", "2"] in rows
    assert not [row for row in rows if "train.steps" in row]


@pytest.mark.parametrize("name", ["corpus", "training_fraction", "segmentations", "bpe_dropout"])
def test_tables_show_params_of_prepare_that_differ(name):
    a = RUNS[0]
    b = dataclasses.replace(a, params=a.params | {f"data.{name}": "24", "data.train_tokens": "5"})
    assert f"{name}=24" in text(row_per_run([a, b], 120), width=120)
    rows = lines(*column_per_run([a, b], 120))
    assert [f"data.{name}", "-", "24"] in rows and "train_tokens" not in str(rows)


def test_tables_show_the_loss_of_the_model_and_that_of_the_best_evaluation():
    metrics = {"kept_val_loss": 11.0, "best_val_loss": 8.5, "best_step": 30.0}
    last = dataclasses.replace(RUNS[0], metrics=metrics)
    rows = lines(*column_per_run([last, RUNS[1]], 120))
    assert ["validation", "loss", "11.0000", "4.2500"] in rows
    assert ["best", "evaluation", "8.5000", "4.2500"] in rows
    assert last.loss == 11.0 and "11.0000" in text(row_per_run([last], 120), width=120)


def test_params_of_evaluations_are_compared_among_evaluated_runs():
    evaluated = [
        dataclasses.replace(RUNS[0], params=RUNS[0].params | {"evaluate.stride": stride})
        for stride in ("1", "16")
    ]
    rows = lines(row_per_run([*evaluated, RUNS[1]], 120))
    strides = [word for row in rows for word in row if word.startswith("evaluate.")]
    assert strides == ["evaluate.stride=1", "evaluate.stride=16", "evaluate.stride=-"]
    one = text(row_per_run([evaluated[0], RUNS[1]], 120), width=120)
    assert "stride" not in one
    assert ["evaluate.stride", "1", "16"] in lines(*column_per_run(evaluated, 120))


@pytest.mark.parametrize("width", [80, 100, 120])
@pytest.mark.parametrize("number", [1, 2, 5, 9])
def test_tables_are_complete_at_any_width(width, number):
    """Names as long as those of experiments, and eight params that differ."""
    runs = [
        run(
            f"sweep-3fa9c1-0{index} 2x4x128-2f978d",
            4.5 + index,
            **{f"beta_of_param_{key}": f"0.{index}{key}" for key in range(8)},
        )
        for index in range(number)
    ]
    for output in (
        text(row_per_run(runs, width), width=width),
        text(*column_per_run(runs, width), width=width),
    ):
        assert "…" not in output and max(map(len, output.splitlines())) <= width
        words = output.replace("\n", " ").split()
        for index in range(number):
            assert {f"{4.5 + index:.4f}", f"sweep-3fa9c1-0{index}"} <= set(words)
            if number > 1:
                assert sum(f"0.{index}{key}" in output for key in range(8)) == 8
