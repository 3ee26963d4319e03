"""The plan of a sweep: checked, named, stored and listed."""

import dataclasses
import json

import pytest
from conftest import ROOT

from folio.errors import UserError
from folio.sweeps.plan import Plan, check_trials, make_plan, read_plan


def plan(trials: dict[str, dict]) -> Plan:
    return Plan(name="s", baseline="abcdef0123", changes="", base={}, trials=trials)


@pytest.mark.parametrize(
    ("trial", "message"),
    [
        ({"train.steps": 100}, "train.steps=100: train.warmup_steps: 300"),
        ({"model.n_embd": 130}, "model.n_embd=130: model."),
        ({"model.block_size": 16}, "evaluate.stride 32 is longer than model.block_size 16"),
    ],
)
def test_check_trials_reports_params_that_contradict_each_other(trial, message, monkeypatch):
    monkeypatch.chdir(ROOT)
    check_trials([{"train.steps": 400}], {})
    with pytest.raises(UserError) as error:
        check_trials([{"train.steps": 400}, trial], {})
    assert message in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["", "a/b", "-j", "..", "a" * 41])
def test_make_plan_rejects_invalid_names(name):
    with pytest.raises(UserError, match="use at most 40 letters, digits, - and _"):
        make_plan([{"train.seed": 1}], {}, name)


def test_make_plan_derives_the_name_from_the_content(monkeypatch):
    monkeypatch.chdir(ROOT)
    trials = [{"train.seed": 1}, {"train.seed": 2}]
    first, second = make_plan(trials, {}, None), make_plan(trials, {"train.steps": 9}, None)
    assert list(first.trials) == [f"{first.name}-01", f"{first.name}-02"]
    assert first.name != second.name and first.has_derived_name
    assert not make_plan(trials, {}, "mine").has_derived_name


def test_read_plan_returns_what_was_saved(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    saved = plan({"s-01": {"train.patience": None}, "s-02": {"train.patience": 3}})
    saved.save()
    assert read_plan("s") == saved


def test_read_plan_reads_the_plans_of_older_versions(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    saved = plan({"s-01": {"train.seed": 1}})
    saved.save()
    saved.path.write_text(saved.path.read_text().replace('"trials"', '"points"'))
    assert read_plan("s") == saved


def test_read_plan_reports_a_damaged_plan_on_one_line(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "sweeps/x").mkdir(parents=True)
    saved = dataclasses.asdict(plan({"x-1": {"train.seed": 1}})) | {"name": "x"}
    trials = {"x-1": {"train.seed": 1}, "x-2": {"train.steps": 1}}
    others = [{"name": "y"}, {"baseline": 5}, {"base": []}, {"trials": {}}, {"trials": [1]}]
    others += [{"trials": {"x-1": 5}}, {"trials": trials}]
    contents = ["{", "[]", "5", json.dumps({"name": "x"})]
    for content in contents + [json.dumps(saved | other) for other in others]:
        (tmp_path / "sweeps/x/plan.json").write_text(content)
        with pytest.raises(UserError, match="is damaged: remove sweeps/x and run the sweep again"):
            read_plan("x")


def test_overview_shows_what_all_trials_share_once():
    shared = plan(
        {
            "s-1": {"model.n_layer": 2, "train.steps": 9},
            "s-2": {"model.n_layer": 3, "train.steps": 9},
        }
    )
    assert shared.overview().splitlines() == [
        "| trials: 2 | model.n_layer |",
        "| --------: | ------------: |",
        "|       s-1 |             2 |",
        "|       s-2 |             3 |",
        "all trials use train.steps=9",
    ]
