"""benchmarks.ablation turns options off one by one, and finds their runs in MLflow by params."""

import itertools

import pytest

from benchmarks import ablation
from benchmarks.ablation import ALL_ON, FRACTION, OPTIONS, SEED
from benchmarks.ablation_results import (
    BEST,
    METRICS,
    Result,
    curve_table,
    draw,
    options_table,
)
from folio.sweeps import variants
from folio.tracking.queries import TrackedRun

VALUES = ablation.resolve(variants.read("best-30m"))
SEEDS = 2


def settings():
    return [s for part in ablation.PARTS for s in ablation.settings_of(VALUES, part, SEEDS)]


def run(values, loss=4.0, tokens=300_000) -> TrackedRun:
    """A run as the train and evaluate stages log it."""
    params = {k: str(v) for k, v in values.items() if k.startswith(("model.", "train."))}
    params |= {"data.corpus": values["prepare.corpus"], "data.train_tokens": str(tokens)}
    if values["prepare.segmentations"]:
        for key in ("segmentations", "bpe_dropout"):
            params[f"data.{key}"] = str(values[f"prepare.{key}"])
    if values[FRACTION] < 1:
        params["data.training_fraction"] = str(values[FRACTION])
    return TrackedRun(
        id="",
        folio_id="",
        name="",
        experiment="",
        status="FINISHED",
        started=0,
        ended=1,
        params=params,
        metrics=dict.fromkeys(METRICS, loss) | {BEST: loss - 0.5},
        tags={},
    )


def test_each_option_of_the_variant_is_turned_off_alone():
    names = [each.name for each in ablation.settings_of(VALUES, "options", 1)]
    on = {"Muon", "factored embedding", "BPE dropout", "unseen smoothing", "input noise", "dropout"}
    assert names[0] == ALL_ON and on <= set(names) and "distillation" not in names
    for name, off in OPTIONS.items():
        first = next(iter(off))
        assert (name in names) == (VALUES[first] != off[first])
        assert off.items() <= ablation.resolve(off).items()  # valid in params.yaml


def test_trials_differ_and_set_the_same_params():
    trials = ablation.make_trials(VALUES, settings())
    assert all(a != b for a, b in itertools.combinations(trials.values(), 2))
    assert len({frozenset(trial) for trial in trials.values()}) == 1
    options = len(ablation.settings_of(VALUES, "options", 1))
    assert len(trials) == SEEDS * (options + 4)  # all of the text: `all on`
    assert trials["no Muon, seed 2"]["train.optimizer"] == "adamw"
    assert trials["text: 1/4, seed 1"] == trials["all on, seed 1"] | {FRACTION: 0.25}


def test_each_run_is_found_by_its_params_alone():
    trials = ablation.make_trials(VALUES, settings())
    runs = [run(VALUES | trial) for trial in trials.values()]
    for trial, own in zip(trials.values(), runs, strict=True):
        assert ablation.find(VALUES | trial, runs[::-1]) is own
        assert ablation.find(VALUES | trial, [each for each in runs if each is not own]) is None


def test_run_that_was_not_evaluated_or_has_another_corpus_is_not_found():
    values = VALUES | {SEED: 1}
    unevaluated, other = run(values), run(values | {"prepare.corpus": "shakespeare"})
    unevaluated.metrics.pop("evaluate/val_loss_sliding")
    assert ablation.find(values, [unevaluated, other]) is None


def test_missing_runs_are_named(capsys):
    [first, *_] = all_settings = settings()
    runs = [run(VALUES | {SEED: 2}, 4.5)]
    [result, whole_text] = ablation.results_of(VALUES, all_settings, runs)
    assert (result.name, result.loss, whole_text.name) == (first.name, 4.5, "all")
    printed = capsys.readouterr().out.splitlines()
    assert printed[0] == "MLflow has no finished run: all on, seed 1"
    assert "MLflow has no finished run: no Muon, seed 1, 2" in printed


def result(name, *losses, tokens=300_000):
    return Result(name, [run(VALUES, loss, tokens) for loss in losses])


def rows(table):
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()]


def test_options_are_sorted_by_what_they_are_worth():
    found = [result(ALL_ON, 4.0, 4.1), result("dropout", 4.0, 4.08), result("Muon", 4.3, 4.2)]
    table = options_table(found)
    assert [row[:4] for row in rows(table)[2:]] == [
        [ALL_ON, "4.050", "4.000..4.100", "+0.000"],
        ["Muon", "4.250", "4.200..4.300", "+0.200"],
        ["dropout", "4.040", "4.000..4.080", "-0.010"],
    ]
    assert max(map(len, table.splitlines())) <= 80


def test_curve_shows_the_last_and_the_lowest_loss():
    table = curve_table([result("1/16", 8.0, tokens=18_872), result("all", 4.0)])
    assert [row[:5] for row in rows(table)[2:]] == [
        ["1/16", "18,872", "8.000", "8.000..8.000", "7.500"],
        ["all", "300,000", "4.000", "4.000..4.000", "3.500"],
    ]
    assert max(map(len, table.splitlines())) <= 80


@pytest.mark.parametrize("parts", ["options", "curve", "both"])
def test_picture_shows_one_or_both_parts(tmp_path, parts):
    options = [result(ALL_ON, 4.0), result("Muon", 4.0)] if parts != "curve" else []
    curve = [result("1/16", 8.0, tokens=9), result("all", 4.0)] if parts != "options" else []
    draw(options, curve, tmp_path / "picture.png")
    assert (tmp_path / "picture.png").stat().st_size > 10_000
