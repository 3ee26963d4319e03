"""The trainer: what it computes, saves and resumes, without DVC and MLflow."""

import collections
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import ROOT, TINY

from folio import device, params
from folio.distributed import ONE_PROCESS
from folio.errors import UserError
from folio.gpt.model import ModelParams
from folio.run import HISTORY, read_history, write_history
from folio.tokens.token_files import TokenData
from folio.training import checkpoint, optimizer_state, optimizers
from folio.training.params import TrainParams
from folio.training.sharded_weights import ShardedWeights
from folio.training.step import NonFiniteError
from folio.training.trainer import Trainer

CPU = torch.device("cpu")


def settings(section, cls):
    """A section of params.yaml under TINY."""
    [loaded] = params.load(ROOT / "params.yaml", **{section: cls})
    tiny = {name.partition(".")[2]: v for name, v in TINY.items() if name.startswith(section)}
    return replace(loaded, **tiny)


MODEL, TRAIN = settings("model", ModelParams), settings("train", TrainParams)
# Plain AdamW, which fsdp supports; OPTIONS has the rest.
TRAIN = replace(TRAIN, optimizer="adamw", factored_embedding=False, unseen_probability=0.0)


def make_trainer(
    model=MODEL, train=TRAIN, precision="fp32", group=ONE_PROCESS, segmented=(), where=CPU
):
    ids = np.random.default_rng(1).integers(97, size=700).astype(np.uint16)
    counts = np.bincount(ids[:600], minlength=97)
    more = sum((np.bincount(each, minlength=97) for each in segmented), np.zeros(97, int))
    data = TokenData(ids[:600], ids[600:], {"vocabulary": 97}, "digest", counts, segmented, more)
    return Trainer(model, train, data, where, precision, None, group)


def advance(trainer, steps):
    """Train, with a row after each step."""
    for _ in range(steps):
        step = trainer.steps_done
        trainer.step(trainer.batches(step), trainer.learning_rate(step))
        trainer.log(trainer.read())


def metrics(trainer):
    return [{k: v for k, v in row.items() if k != "time"} for row in trainer.history.rows]


OPTIONS = {
    "optimizer": "muon",
    "factored_embedding": True,
    "tie_unseen_tokens": True,
    "unseen_probability": 0.02,
    "input_noise": 0.2,
}


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("options", [{}, OPTIONS], ids=["plain", "options"])
def test_trainer_resumes_bit_for_bit(tmp_path, precision, options):
    train = replace(TRAIN, **options)
    uninterrupted, stopped = (make_trainer(train=train, precision=precision) for _ in range(2))
    advance(uninterrupted, 6)
    advance(stopped, 3)
    stopped.save(tmp_path)
    resumed = make_trainer(train=train, precision=precision)
    resumed.resume(tmp_path)
    assert resumed.steps_done == 3
    advance(resumed, 3)
    assert metrics(resumed) == metrics(uninterrupted)
    for name, weight in uninterrupted.model.state_dict().items():
        assert torch.equal(weight, resumed.model.state_dict()[name]), name


def test_trainer_with_segmentations_resumes_bit_for_bit(tmp_path):
    ids = np.random.default_rng(2).integers(90, 97, size=(3, 700)).astype(np.uint16)
    segmented = (ids[0], ids[1, :690], ids[2, :680])
    uninterrupted, stopped = (make_trainer(segmented=segmented) for _ in range(2))
    advance(uninterrupted, 6)
    advance(stopped, 3)
    stopped.save(tmp_path)
    resumed = make_trainer(segmented=segmented)
    resumed.resume(tmp_path)
    advance(resumed, 3)
    assert metrics(resumed) == metrics(uninterrupted)
    for name, weight in uninterrupted.model.state_dict().items():
        assert torch.equal(weight, resumed.model.state_dict()[name]), name
    without = make_trainer()
    advance(without, 6)
    assert metrics(without)[0]["train_loss"] != metrics(uninterrupted)[0]["train_loss"]


def test_token_that_occurs_only_in_a_segmentation_is_not_tied():
    before, after = make_trainer(), make_trainer(segmented=(np.full(600, 90, np.uint16),))
    assert before.data.train_counts[90] == 0 and before.vocabulary.multiplicity is not None
    assert after.vocabulary.multiplicity is None  # 90 was the only token that did not occur


def test_trainer_resumes_best_weights(tmp_path):
    trainer = make_trainer()
    advance(trainer, 1)
    trainer.early_stopping.update(5.0, 1, trainer.weights.state())
    best = {name: weight.clone() for name, weight in trainer.model.state_dict().items()}
    for saved_at in (1, 3):  # the best weights are the model's own, then older ones
        trainer.save(tmp_path)
        resumed = make_trainer()
        resumed.resume(tmp_path)
        assert resumed.steps_done == saved_at
        assert resumed.early_stopping.state_dict() == trainer.early_stopping.state_dict()
        for name, weight in best.items():
            assert torch.equal(weight, resumed.early_stopping.best_weights[name]), name
        advance(trainer, 2)
        trainer.early_stopping.update(6.0, 3, trainer.weights.state())


def test_trainer_that_keeps_the_last_weights_saves_no_others(tmp_path):
    settings = replace(TRAIN, keep="last", patience=None)
    trainer = make_trainer(train=settings)
    advance(trainer, 1)
    trainer.early_stopping.update(5.0, 1, trainer.weights.state())
    for saved_at in (1, 3):  # right after the best evaluation, and later
        trainer.save(tmp_path)
        found = checkpoint.load_latest(tmp_path, ONE_PROCESS, None)
        assert not [name for name in found.tensors if name.startswith("best")]
        resumed = make_trainer(train=settings)
        resumed.resume(tmp_path)
        assert resumed.steps_done == saved_at
        assert resumed.early_stopping.best_weights == {}
        assert resumed.early_stopping.state_dict() == trainer.early_stopping.state_dict()
        advance(trainer, 2)
        advance(resumed, 2)
        for name, weight in trainer.model.state_dict().items():
            assert torch.equal(weight, resumed.kept_weights[name]), name


def test_batches_repeat_the_windows_of_the_first_steps_if_overfit_batches_is_set():
    usual, overfitting = make_trainer(), make_trainer(train=replace(TRAIN, overfit_batches=2))

    def windows(trainer, step):
        return torch.cat([torch.cat(pair, 1) for pair in trainer.batches(step)])

    assert len(windows(usual, 0)) == TRAIN.batch_size * TRAIN.accumulation
    assert not torch.equal(windows(usual, 0), windows(usual, 2))
    for step in range(6):
        assert torch.equal(windows(overfitting, step), windows(usual, step % 2))
    assert overfitting.tokens_per_epoch == 2 * overfitting.tokens_per_step
    assert usual.tokens_per_epoch == 600  # all training tokens


def test_trainer_does_not_resume_without_a_checkpoint(tmp_path):
    trainer = make_trainer()
    trainer.resume(tmp_path / "nothing")
    assert trainer.steps_done == 0 and trainer.history.rows == []


@pytest.mark.parametrize("change", [{"n_layer": 3}, {"n_embd": 32}])
def test_trainer_refuses_checkpoint_of_another_model_in_one_line(tmp_path, change):
    make_trainer().save(tmp_path)
    other = make_trainer(model=replace(MODEL, **change))
    with pytest.raises(UserError, match=r"remove \.checkpoints to start over") as error:
        other.resume(tmp_path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_trainer_rejects_optimizer_state_that_it_cannot_save_in_the_first_update(
    monkeypatch, precision
):
    class Averaging(torch.optim.SGD):
        def step(self):
            super().step()
            self.state[self.param_groups[0]["params"][0]]["past"] = collections.deque([1.0])

    monkeypatch.setattr(optimizers, "build", lambda weights, *_: Averaging(weights.parameters))
    trainer = make_trainer(precision=precision)
    if precision == "fp16":  # the update of the first step is skipped
        trainer._step.scale.fill_(2.0**40)
        trainer.step(trainer.batches(0), 1e-3)
        trainer._step.scale.fill_(64.0)
    with pytest.raises(
        UserError, match=r"optimizer Averaging: state\[0\]\['past'\] has type deque"
    ):
        trainer.step(trainer.batches(0), 1e-3)


def test_trainer_checks_the_optimizer_state_once(monkeypatch):
    calls = []
    monkeypatch.setattr(optimizer_state, "save", calls.append)
    advance(make_trainer(), 3)
    assert len(calls) == 1


def test_trainer_reports_checkpoint_of_another_machine(tmp_path, monkeypatch, capsys):
    make_trainer().save(tmp_path)
    make_trainer().resume(tmp_path)
    assert capsys.readouterr().out == ""
    monkeypatch.setattr(device, "describe", lambda _: "NVIDIA H200")
    make_trainer().resume(tmp_path)
    message = capsys.readouterr().out
    assert "the checkpoint was made on cpu, " in message and "is on NVIDIA H200" in message
    assert "will not be bitwise identical" in message


def test_trainer_compiles_long_trainings_by_itself():
    def wants(compile, steps=TRAIN.steps):
        trainer = make_trainer()
        trainer.params = replace(trainer.params, compile=compile, steps=steps)
        return trainer._wants_compile()

    assert [wants("auto"), wants("always"), wants("never")] == [False, True, False]
    assert [wants("auto", 10**12), wants("never", 10**12)] == [True, False]


def test_row_is_due_at_log_points_and_evaluations_once():
    trainer = make_trainer(train=replace(TRAIN, steps=11, eval_interval=4))
    due = []
    for step in range(1, 12):
        trainer.steps_done = step
        if trainer.row_is_due(log_interval=3):
            due.append(step)
            trainer.log({})
        assert not trainer.row_is_due(log_interval=3)
    assert due == [3, 4, 6, 8, 9, 11] and trainer.finished


def test_stability_hint_names_the_rates_that_matter():
    muon = make_trainer(train=replace(TRAIN, optimizer="muon"), precision="bf16").stability_hint
    assert "muon_learning_rate" in muon and "grad_clip" not in muon and "fp32" in muon
    plain = make_trainer().stability_hint
    assert "muon" not in plain and "grad_clip" in plain and "fp32" not in plain


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_fp8_head_is_refused_on_a_cpu(precision):
    with pytest.raises(UserError) as error:
        make_trainer(train=replace(TRAIN, fp8_head=True), precision=precision)
    message = str(error.value)
    assert message.startswith("train.fp8_head needs bf16 or fp16 on an NVIDIA GPU with fp8")
    run = f"this run is in {precision} on cpu, {torch.get_num_threads()} thread"
    assert run in message and "\n" not in message
    sizes = f"{MODEL.n_embd} channels and {MODEL.n_embd // MODEL.n_head} per head"
    assert message.endswith(f"with {sizes}: set it to false")


def test_fp8_head_is_refused_with_shards():
    with pytest.raises(UserError, match=r"train\.fp8_head needs .*, or train\.parallel to ddp$"):
        object.__new__(ShardedWeights).fuse(fp8_head=True)


def test_unseen_probability_has_no_effect_without_a_shared_row():
    losses = []
    for share in (0.0, 0.3):
        trainer = make_trainer(
            train=replace(TRAIN, tie_unseen_tokens=False, unseen_probability=share)
        )
        advance(trainer, 2)
        losses.append(metrics(trainer))
    assert losses[0] == losses[1]


def test_read_fails_at_the_last_finite_step():
    trainer = make_trainer()
    advance(trainer, 2)
    before = [p.detach().clone() for p in trainer.model.parameters()]
    sound = trainer.model.loss
    trainer.model.loss = lambda *batch: sound(*batch) * torch.nan
    trainer.step(trainer.batches(2), 1e-3)
    trainer.step(trainer.batches(3), 1e-3)
    with pytest.raises(NonFiniteError, match="the loss is not finite"):
        trainer.read()
    assert trainer.steps_done == 2
    assert all(map(torch.equal, before, trainer.model.parameters()))


def test_save_last_finite_leaves_out_what_is_not_finite(tmp_path):
    trainer = make_trainer()
    advance(trainer, 2)
    trainer.model.loss = lambda *batch: torch.tensor(torch.nan, requires_grad=True)
    trainer.step(trainer.batches(2), 1e-3)
    trainer.save_last_finite(tmp_path)
    resumed = make_trainer()
    resumed.resume(tmp_path)
    assert resumed.steps_done == 2


def test_history_keeps_rows_that_mlflow_has_when_steps_are_repeated(tmp_path):
    sent = [{"step": step, "time": step, "train_loss": 1.0} for step in (1, 2, 3)]
    make_trainer().save(tmp_path)  # at step 0: the checkpoints after it were damaged
    write_history(sent, tmp_path / HISTORY)
    for _ in range(2):  # and the resumed training is killed at once
        trainer = make_trainer()
        trainer.resume(tmp_path)
        trainer.save(tmp_path)
    advance(trainer, 2)
    assert trainer.history.rows == sent[:2]
    trainer.save(tmp_path)
    assert read_history(tmp_path / HISTORY) == sent


def test_repeated_step_gets_a_row_if_it_had_one_before(tmp_path):
    sent = [{"step": step, "time": step, "train_loss": 1.0} for step in (1, 3, 5)]
    write_history(sent, tmp_path / HISTORY)  # its checkpoints were removed
    trainer = make_trainer(train=replace(TRAIN, steps=6, eval_interval=6))
    trainer.resume(tmp_path)
    due = []
    for step in range(1, 7):
        trainer.steps_done = step
        if trainer.row_is_due(log_interval=4):
            due.append(step)
            trainer.log({})
    assert due == [1, 3, 4, 5, 6]
    assert [row for row in trainer.history.rows if row in sent] == sent
