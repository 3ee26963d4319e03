"""The train stage: its loop, early stopping, checkpoints, and what it writes."""

import json
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import run_stages

from benchmarks import check_entry
from folio import params
from folio.gpt import huggingface
from folio.gpt.model import ModelParams
from folio.gpt.validation import token_losses
from folio.runtime import RuntimeParams
from folio.tokens import token_files, tokenizer
from folio.tracking.logger import NoLogger
from folio.training import messages, outputs
from folio.training.params import TrainParams
from folio.training.trainer import Trainer
from stages import train

PATIENCE, INTERVAL = 2, 5


@pytest.fixture(scope="module")
def overfitted(make_project) -> Path:
    """A project whose learning rate is far too high, so that validation loss soon rises."""
    folder = make_project(
        {
            "train.steps": 400,
            "train.learning_rate": 0.1,
            "train.min_learning_rate": 0.1,
            "train.eval_interval": INTERVAL,
            "train.patience": PATIENCE,
        }
    )
    run_stages(folder, "prepare", "train", "evaluate")
    return folder


def read(folder: Path, file: str) -> dict:
    return json.loads((folder / "models" / file).read_text())


def test_train_stops_when_patience_is_exhausted(overfitted):
    metrics = read(overfitted, "training/metrics.json")
    assert metrics["steps"] == metrics["best_step"] + PATIENCE * INTERVAL < 400
    assert metrics["last_val_loss"] > metrics["best_val_loss"]


def test_train_writes_the_best_weights(overfitted):
    metrics = read(overfitted, "training/metrics.json")
    best = metrics["best_val_loss"]
    assert read(overfitted, "evaluation/metrics.json")["val_loss"] == pytest.approx(best, abs=1e-5)
    assert (metrics["kept_val_loss"], metrics["kept_step"]) == (best, metrics["best_step"])


def test_train_writes_the_last_weights_if_keep_is_last(overfitted, tmp_path):
    trainer = make_trainer(overfitted, steps=60, patience=None, keep="last")
    (runtime,) = params.load(overfitted / "params.yaml", runtime=RuntimeParams)
    train.train(trainer, runtime, tmp_path, NoLogger())
    record = outputs.start_record(trainer, tmp_path, tmp_path, {})
    outputs.write(trainer, record, tmp_path)
    metrics = read(tmp_path, "training/metrics.json")
    assert metrics["kept_step"] == metrics["steps"] == 60 > metrics["best_step"]
    assert metrics["kept_val_loss"] == metrics["last_val_loss"] > metrics["best_val_loss"]
    written = huggingface.load(tmp_path / "models/gpt2", torch.device("cpu"))
    loss = token_losses(written, trainer.data.val).mean()
    assert loss == pytest.approx(metrics["kept_val_loss"], abs=1e-5)
    said = messages.result(trainer)
    assert f"step 60: validation loss {metrics['kept_val_loss']:.3f}; the best" in said
    assert said.endswith(f"{metrics['best_val_loss']:.3f} at step {metrics['best_step']}")


def test_checker_from_outside_agrees_with_evaluate(overfitted, tmp_path):
    text, metrics = tmp_path / "text.txt", read(overfitted, "evaluation/metrics.json")
    text.write_text(tokenizer.decode(token_files.read(overfitted / "data/prepared").val))
    *_, separate, sliding = check_entry.check(overfitted / "models/gpt2", text, 8, True).split("\n")
    assert float(separate.split()[-2]) == pytest.approx(metrics["val_loss"], abs=6e-5)
    assert float(separate.split()[-1]) == pytest.approx(metrics["val_loss_per_character"], abs=6e-5)
    assert float(sliding.split()[-2]) == pytest.approx(metrics["val_loss_sliding"], abs=6e-5)


def test_history_has_a_row_per_log_point_from_which_the_loss_curve_is_drawn(overfitted):
    rows = [json.loads(row) for row in (overfitted / "models/training/history.jsonl").open()]
    assert [row["step"] for row in rows] == list(range(1, len(rows) + 1))
    table = (overfitted / "models/training/val_loss.csv").read_text().splitlines()
    assert len(table) == 1 + len(rows) // INTERVAL
    assert (overfitted / "models/evaluation/loss.png").stat().st_size > 5_000


def make_trainer(folder: Path, **settings) -> Trainer:
    model, loaded = params.load(folder / "params.yaml", model=ModelParams, train=TrainParams)
    data = token_files.read(folder / "data/prepared")
    return Trainer(model, replace(loaded, **settings), data, torch.device("cpu"), "fp32", None)


@pytest.mark.parametrize(("seconds", "steps"), [(0.0, [5, 10, 15, 20]), (0.3, [5, 20])])
def test_train_saves_after_evaluations_as_far_as_that_takes_a_tenth_of_the_time(
    overfitted, tmp_path, seconds, steps
):
    trainer, saved = make_trainer(overfitted, steps=20, patience=None), []

    def save(folder):
        time.sleep(seconds)
        saved.append(trainer.steps_done)

    trainer.save = save
    (runtime,) = params.load(overfitted / "params.yaml", runtime=RuntimeParams)
    train.train(trainer, runtime, tmp_path, NoLogger())
    assert saved == steps


def test_train_starts_the_logger_after_the_first_step(overfitted, tmp_path):
    trainer, started = make_trainer(overfitted, steps=2, patience=None), []

    class Recorder(NoLogger):
        def start(self) -> None:
            started.append(trainer.steps_done)

    (runtime,) = params.load(overfitted / "params.yaml", runtime=RuntimeParams)
    train.train(trainer, runtime, tmp_path, Recorder())
    assert started[0] == 1


def test_corpus_is_printed_before_the_model_is_created(overfitted, monkeypatch, capsys):
    def create(*_):
        raise InterruptedError

    monkeypatch.setattr(train, "Trainer", create)
    with pytest.raises(InterruptedError):
        run_stages(overfitted, "train")
    [line] = capsys.readouterr().out.splitlines()
    assert " training tokens, " in line and line.endswith(" validation tokens")
