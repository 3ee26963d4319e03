"""What training keeps of what it has seen."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
from conftest import ROOT, run

from folio import params
from folio.model import ModelParams
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
    for stage in ("prepare", "train"):
        done = run(folder, "python", "-m", f"stages.{stage}")
        assert done.returncode == 0, done.stderr
    return folder


def read(folder: Path, file: str) -> dict:
    return json.loads((folder / "models" / file).read_text())


def test_training_stops_after_as_many_worse_evaluations_as_patience_allows(overfitted):
    metrics = read(overfitted, "training/metrics.json")
    assert metrics["steps"] == metrics["best_step"] + PATIENCE * INTERVAL < 400
    assert metrics["last_val_loss"] > metrics["best_val_loss"]


def test_the_weights_of_the_best_evaluation_are_the_ones_kept(overfitted):
    assert run(overfitted, "python", "-m", "stages.evaluate").returncode == 0
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
        train.train_key(model, one, "data"),
        train.train_key(model, one, "other data"),
        train.train_key(replace(model, dropout=0.5), one, "data"),
        train.train_key(model, replace(one, seed=one.seed + 1), "data"),
    }
    assert len(keys) == 4
    assert train.train_key(model, one, "data") in keys
