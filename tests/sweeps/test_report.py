"""The report of a sweep, from results that are made up."""

from dataclasses import replace

import pytest

from folio.sweeps.plan import Plan
from folio.sweeps.report import TrialResult, format_report


def result(number: int, loss: float, **trial) -> TrialResult:
    return TrialResult(
        experiment=f"s-{number:02}",
        trial={name.replace("__", "."): value for name, value in trial.items()},
        loss=loss,
        step=90,
        seconds=61.4,
        run=f"s-{number:02} 1x2x16-abcdef",
    )


def plan(results: list[TrialResult]) -> Plan:
    trials = {each.experiment: each.trial for each in results}
    return Plan(name="s", baseline="abcdef0123", changes="", base={}, trials=trials)


def test_report_shows_the_variation_between_seeds():
    results = [
        result(seed + int(loss), loss + seed / 100, train__learning_rate=rate, train__seed=seed)
        for rate, loss in ((1e-3, 50.0), (2e-3, 40.0))
        for seed in (1, 2, 3)
    ]
    text = format_report(plan(results), sorted(results, key=lambda each: each.loss))
    assert "| 1x2x16-abcdef |" in text  # the experiment is in the first column
    assert "Finished trials: 6 of 6, starting from commit abcdef0." in text and "1 min 01 s" in text
    assert [line.split("|")[2:6] for line in text.splitlines() if "40.0100 |" in line][1] == [
        "     3 ", " 40.0200 ", " 40.0100 ", " 40.0300 ",
    ]  # fmt: skip
    assert "have a standard deviation of 0.0100 (4 degrees of freedom)" in text
    assert "it needs at least 10 trials, and 6 have finished" in text
    pair = [each for each in results if each.loss < 40.025]
    assert "(1 degree of freedom)" in format_report(plan(pair), pair)


def test_report_without_seeds_warns_of_small_differences():
    results = [result(i, 5.0 + i, train__steps=10 + i) for i in range(3)]
    text = format_report(plan(results), results)
    assert "A sweep over `train.seed=1,2,3` shows how much" in text
    assert "Importance" not in text  # of a single param


def test_report_of_one_trial_compares_nothing():
    short = replace(result(1, 5.0, train__steps=10), seconds=18.2)
    text = format_report(plan([short]), [short])
    assert (
        "Variation" not in text
        and " 18 s |" in text
        and "0 min" not in text
        and "Finished trials: 1 of 1, " in text
    )


def test_report_without_results_says_so():
    planned = [result(i, 5.0, train__steps=10 + i) for i in range(2)]
    assert format_report(plan(planned), []).endswith("\n\nNo trial has finished.\n")


def test_importance_ranks_the_param_first_that_changes_the_loss():
    pytest.importorskip("optuna")
    results = [
        result(i, 5 - layers + dropout / 10, model__dropout=dropout, model__n_layer=layers)
        for i, (dropout, layers) in enumerate((d / 10, n) for d in range(4) for n in (1, 2, 3))
    ]
    text = format_report(plan(results), results)
    cells = [line.split("|") for line in text.split("Importance")[1].splitlines()]
    rows = [(row[1].strip(), float(row[2])) for row in cells if len(row) == 4 and "0." in row[2]]
    assert [name for name, _ in rows] == ["n_layer", "dropout"]
    assert rows[0][1] > 0.9 and abs(sum(share for _, share in rows) - 1) < 0.02
