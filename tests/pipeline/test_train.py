"""What training keeps of what it has seen."""

import json
import shutil
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from conftest import ROOT, run_stages
from tqdm import tqdm

from folio import device, params
from folio.run import read_history, write_history
from folio.tokens import token_files
from folio.gpt.model import ModelParams
from folio.runtime import RuntimeParams
from stages import train

PATIENCE, INTERVAL = 2, 5


@pytest.fixture(scope="module")
def overfitted(make_project) -> Path:
    """A project whose training is far too fast, so that held-out loss soon rises."""
    folder = make_project(
        {
            "train.steps": 400,
            "train.learning_rate": 0.1,
            "train.min_learning_rate": 0.1,
            "train.eval_interval": INTERVAL,
            "train.patience": PATIENCE,
        }
    )
    run_stages(folder, "prepare", "train")
    return folder


def read(folder: Path, file: str) -> dict:
    return json.loads((folder / "models" / file).read_text())


def test_training_stops_after_as_many_worse_evaluations_as_patience_allows(overfitted):
    metrics = read(overfitted, "training/metrics.json")
    assert metrics["steps"] == metrics["best_step"] + PATIENCE * INTERVAL < 400
    assert metrics["last_val_loss"] > metrics["best_val_loss"]


def test_the_weights_of_the_best_evaluation_are_the_ones_kept(overfitted):
    run_stages(overfitted, "evaluate")
    best = read(overfitted, "training/metrics.json")["best_val_loss"]
    assert read(overfitted, "evaluation/metrics.json")["val_loss"] == pytest.approx(best, abs=1e-5)


def test_the_loss_curve_is_drawn_from_each_row_of_the_history(overfitted):
    rows = [json.loads(row) for row in (overfitted / "models/training/history.jsonl").open()]
    assert [row["step"] for row in rows] == list(range(1, len(rows) + 1))
    drawn = (overfitted / "models/training/held_out.csv").read_text().splitlines()
    assert len(drawn) == 1 + len(rows) // INTERVAL
    assert (overfitted / "models/training/loss.png").stat().st_size > 5_000


def test_a_key_changes_with_the_data_and_with_any_model_or_train_param():
    model, one = params.load(ROOT / "params.yaml", model=ModelParams, train=train.TrainParams)
    keys = {
        train.train_key(model, one, "data", None),
        train.train_key(model, one, "other data", None),
        train.train_key(replace(model, dropout=0.5), one, "data", None),
        train.train_key(model, replace(one, seed=one.seed + 1), "data", None),
    }
    assert len(keys) == 4
    assert train.train_key(model, one, "data", None) in keys


def trainer(folder: Path, monkeypatch: pytest.MonkeyPatch) -> train.Trainer:
    monkeypatch.chdir(folder)
    model, settings = params.load(model=ModelParams, train=train.TrainParams)
    data = token_files.read(folder / "data/prepared")
    return train.Trainer(model, settings, data, torch.device("cpu"), "fp32", None)


def test_a_long_training_compiles_of_itself_and_any_as_it_is_told(overfitted, monkeypatch):
    one = trainer(overfitted, monkeypatch)
    short = one.p
    assert short.compile == "auto" and not one.compiles
    one.p = replace(short, steps=10**12)
    assert one.compiles
    for told in ("always", "never"):
        one.p = replace(short, compile=told)
        assert one.compiles == (told == "always")


@pytest.mark.parametrize(("seconds", "steps"), [(0.0, [5, 10, 15, 20]), (0.3, [5, 20])])
def test_evaluations_save_a_checkpoint_as_far_as_that_takes_a_tenth_of_the_time(
    overfitted, monkeypatch, tmp_path, seconds, steps
):
    one, saved = trainer(overfitted, monkeypatch), []

    def save(folder):
        time.sleep(seconds)
        saved.append(one.step)

    one.p, one.save = replace(one.p, steps=20, patience=None), save
    (runtime,) = params.load(runtime=RuntimeParams)
    one.train(tmp_path, runtime, Untracked())
    assert saved == steps


class Untracked:
    def follow(self, history):
        pass


def test_a_checkpoint_of_another_machine_is_used_with_a_word(
    overfitted, monkeypatch, tmp_path, capsys
):
    trainer(overfitted, monkeypatch).save(tmp_path)
    trainer(overfitted, monkeypatch).resume(tmp_path)
    assert capsys.readouterr().out == ""
    monkeypatch.setattr(device, "describe", lambda _: "NVIDIA H200")
    trainer(overfitted, monkeypatch).resume(tmp_path)
    told = capsys.readouterr().out
    assert "the checkpoint was made on cpu, " in told and "this is on NVIDIA H200" in told
    assert "will not be, bit for bit" in told


def test_every_module_that_train_uses_has_a_say_in_its_key_or_none_in_the_weights():
    described = yaml.safe_load((ROOT / "dvc.yaml").read_text())["stages"]["train"]
    used = {Path(dep).stem for dep in described["deps"] if dep.startswith("folio/")}
    no_say = {"checkpoint", "errors", "files", "follower", "lock", "packages", "params"}
    no_say |= {"pictures", "records", "registry", "runtime", "stopping", "tokenizer", "tracking"}
    no_say |= {"view"}
    assert used - no_say == set(train.ARITHMETIC)


def test_changed_arithmetic_never_goes_on_from_another_ones_checkpoint(
    overfitted, monkeypatch, tmp_path
):
    model, one = params.load(ROOT / "params.yaml", model=ModelParams, train=train.TrainParams)
    before = train.train_key(model, one, "data", None)
    shutil.copytree(ROOT / "folio", tmp_path / "folio")
    monkeypatch.setattr(device, "__file__", str(tmp_path / "folio/folio/device.py"))
    assert train.train_key(model, one, "data", None) == before
    with (tmp_path / "folio/folio.gpt/model.py").open("a") as file:
        file.write("# another way to compute\n")
    assert train.train_key(model, one, "data", None) != before


def test_rows_that_mlflow_has_are_kept_when_their_steps_are_done_once_more(
    overfitted, monkeypatch, tmp_path
):
    told = [{"step": step, "time": step, "train_loss": 1.0} for step in (1, 2, 3)]
    one = trainer(overfitted, monkeypatch)
    one.save(tmp_path)  # at step 0: those after it were damaged
    write_history(told, tmp_path / "history.jsonl")
    for _ in range(2):  # and killed again at once
        one = trainer(overfitted, monkeypatch)
        one.resume(tmp_path)
        one.save(tmp_path)
    for _ in range(2):
        one.advance()
        one.log(one.check(), tqdm(disable=True), load=None)
    assert one.history == told[:2]
    one.save(tmp_path)
    assert read_history(tmp_path / "history.jsonl") == told
