"""benchmarks.memorize finds the runs of the variants, and shows both of their losses."""

import dataclasses
import shutil
import sqlite3
import sys

import pytest
from conftest import inside

from benchmarks import memorize, tracked
from folio.errors import UserError
from folio.sweeps import variants
from folio.tracking.queries import TrackedRun

ROWS = [{"step": 1, "train_loss": 9.0}] + [
    {"step": step, "train_loss": 5.0 / step, "val_loss": 8.0 + abs(step - 60) / 40}
    for step in range(20, 401, 20)
]


def run(name: str, status: str = "FINISHED", **changed: str) -> TrackedRun:
    """A run of a variant as the train stage logs it. changed: other params of train."""
    values = tracked.resolve(variants.read(name))
    params = {k: str(v) for k, v in values.items() if k.startswith(("model.", "train."))}
    params["data.corpus"] = values["prepare.corpus"]
    return TrackedRun(
        id=name,
        folio_id="",
        name=name,
        experiment="",
        status=status,
        started=0,
        ended=95_000,
        params=params | {f"train.{key}": v for key, v in changed.items()},
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


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("data.training_fraction", "0.1"),
        ("data.segmentations", "24"),
        ("train.input_noise", "0.9"),
        ("train.grad_clip", "0.5"),
    ],
)
def test_run_with_other_params_than_those_that_the_variant_sets_is_not_found(key, value):
    other = run("one-batch")
    other.params[key] = value
    assert memorize.find("one-batch", [other]) is None


def test_run_of_an_older_version_is_found_without_the_params_that_it_did_not_have():
    older = run("memorize")
    for key in ("optimizer", "muon_learning_rate", "input_noise", "distill_weight"):
        del older.params[f"train.{key}"]
    assert memorize.find("memorize", [older]) is older
    del older.params["train.keep"]  # it kept the best weights, not the last ones
    assert memorize.find("memorize", [older]) is None


def test_params_without_an_effect_are_not_compared():
    own = run("memorize", muon_learning_rate="0.5", distill_weight="0.1")
    assert memorize.find("memorize", [own]) is own
    muon = tracked.resolve({})
    other = dataclasses.replace(own, params=own.params | {"data.corpus": muon["prepare.corpus"]})
    other.params.update({k: str(v) for k, v in muon.items() if k.startswith(("model", "train"))})
    assert tracked.has_params(other, muon)
    other.params["train.muon_learning_rate"] = "0.5"
    assert not tracked.has_params(other, muon)


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


def test_store_elsewhere_is_read_and_nothing_is_written(empty_store, tmp_path, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")  # the project's
    file = tmp_path / "mlflow.db"
    shutil.copy(empty_store, file)  # its artifacts are not beside it
    before = file.read_bytes()
    [store] = tracked.open_stores([f"sqlite:///{file}"])
    assert tracked.list_runs([store]) == []
    assert file.read_bytes() == before and list(tmp_path.iterdir()) == [file]


def test_what_is_no_store_is_one_line_and_nothing_is_written(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "notes.txt").write_text("These are notes, not a database.\n" * 100)
    with sqlite3.connect("foreign.db") as database:
        database.execute("CREATE TABLE birds (name TEXT)")
    database.close()
    (tmp_path / "folder").mkdir()
    before = {path: path.is_file() and path.read_bytes() for path in tmp_path.iterdir()}
    for uri, message in (
        ("sqlite:///foreign.db", "sqlite:///foreign.db is not an MLflow store: it has no"),
        ("sqlite:///notes.txt", "notes.txt cannot be read as an MLflow store: file is not a data"),
        ("sqlite:///none.db", "there is no MLflow store .*none.db"),
        ("sqlite:///folder", "there is no MLflow store .*folder"),
        ("http://127.0.0.1:9", "http://127.0.0.1:9 cannot be reached"),
        ("foreign.db", "foreign.db is not the URI of an MLflow store: use sqlite:///foreign.db"),
        ("folder", "folder is not the URI of an MLflow store: use sqlite:///FILE"),
    ):
        with pytest.raises(UserError, match=message) as error:
            tracked.open_stores([uri])
        assert "\n" not in str(error.value)
    assert {path: path.is_file() and path.read_bytes() for path in tmp_path.iterdir()} == before


def test_projects_store_is_that_of_its_params(make_project, monkeypatch):
    folder = make_project({"runtime.tracking_uri": "sqlite:///runs/other.db"}, store=False)
    shutil.copytree(memorize.variants.FOLDER.resolve(), folder / "variants")
    monkeypatch.setattr(sys, "argv", ["memorize"])
    with inside(folder):
        with pytest.raises(UserError, match="there is no MLflow store yet"):
            memorize.main()
        (folder / "runs").mkdir()
        tracked.Store("sqlite:///runs/other.db")
        with pytest.raises(UserError, match="MLflow has no run of these variants"):
            memorize.main()
