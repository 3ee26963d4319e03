"""benchmarks.memorize finds the runs of the variants, and shows both of their losses."""

import dataclasses

import pytest

from benchmarks import memorize
from folio.sweeps import variants
from folio.tracking.queries import TrackedRun

ROWS = [{"step": 1, "train_loss": 9.0}] + [
    {"step": step, "train_loss": 5.0 / step, "val_loss": 8.0 + abs(step - 60) / 40}
    for step in range(20, 401, 20)
]


def run(name: str, status: str = "FINISHED", **changed: str) -> TrackedRun:
    params = {key: str(value) for key, value in variants.read(name).items()}
    return TrackedRun(
        id=name,
        folio_id="",
        name=name,
        experiment="",
        status=status,
        started=0,
        ended=95_000,
        params=params | {"train.seed": "1"} | {f"train.{key}": v for key, v in changed.items()},
        metrics={"parameters": 3e7, "evaluate/train_loss": 9.9, "evaluate/val_loss": 11.5}
        | {"evaluate/train_tokens": 36059.0},
        tags={"device": "cpu, 2 threads"},
    )


@pytest.mark.parametrize("name", memorize.NAMES)
def test_run_of_a_variant_is_found_by_its_params(name):
    own = run(name, seed="7")
    others = [run(name, "FAILED"), run(name, steps="10"), run(name)]
    others[-1].params["data.corpus"] = "shakespeare"
    others += [run(other) for other in memorize.NAMES if other != name]
    assert memorize.find(name, [*others, own]) is own
    assert memorize.find(name, others) is None


def test_table_has_the_best_and_the_last_evaluation():
    lines = memorize.table("one-batch", run("one-batch"), ROWS).splitlines()
    assert lines[0] == "one-batch: 30.0 M parameters, cpu, 2 threads, 95 s"
    rows = [line.split() for line in lines[2:-1]]
    assert ["60", "0.0833", "8.000", "best"] in rows and rows[-1] == ["400", "0.0125", "16.500"]
    assert len(rows) <= memorize.ROWS + 1
    assert "9.9000 on 36,059 tokens of the training text, 11.5000 on the valid" in lines[-1]


def test_table_of_a_run_that_was_not_evaluated_has_its_losses_by_step():
    own = dataclasses.replace(run("memorize"), metrics={"parameters": 3e7})
    assert memorize.table("memorize", own, ROWS).splitlines()[-1].split()[0] == "400"


def test_picture_shows_one_or_several_runs(tmp_path):
    for names in (memorize.NAMES[:1], memorize.NAMES):
        memorize.draw(dict.fromkeys(names, ROWS), tmp_path / "picture.png")
        assert (tmp_path / "picture.png").stat().st_size > 10_000
