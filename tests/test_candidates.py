"""benchmarks.candidates trains as the plain recipe does, except for what a candidate changes."""

import functools
import sys
import tempfile
from pathlib import Path

import pytest
import torch
from conftest import inside, run_stages

from benchmarks import candidates, recipe
from benchmarks.candidates import CANDIDATES, Candidate, CandidateTrainer
from folio.tracking.logger import NoLogger
from folio.training.trainer import Trainer
from stages import train as train_stage

SETTINGS = {"train.steps": 24, "train.weight_decay": 5.0, "train.muon_weight_decay": 1.0}
NONE = {"train.weight_decay": 0.0, "train.muon_weight_decay": 0.0}


@pytest.fixture(scope="module")
def prepared(make_project):
    """A project with a prepared text, with two more segmentations."""
    folder = make_project({"prepare.segmentations": 2}, store=False)
    run_stages(folder, "prepare")
    return folder


def build(folder, candidate=None, **settings):
    make = functools.partial(CandidateTrainer, candidate) if candidate else Trainer
    with inside(folder):
        return recipe.build(SETTINGS | settings, make_trainer=make)


def train(folder, candidate=None, **settings):
    """The weights after training, one after another, and the last validation loss."""
    trainer, runtime = build(folder, candidate, **settings)
    with inside(folder), tempfile.TemporaryDirectory() as checkpoints:
        train_stage.train(trainer, runtime, Path(checkpoints), NoLogger())
    weights = torch.cat([p.detach().flatten() for p in trainer.weights.parameters])
    return weights, trainer.history.rows[-1]["val_loss"]


def test_average_of_the_last_weights_alone_is_the_plain_result(prepared):
    weights, loss = train(prepared)
    averaged, same = train(prepared, Candidate(ema=0.0))
    assert torch.equal(averaged, weights) and same == loss
    averaged, other = train(prepared, CANDIDATES["EMA 0.99"])
    assert not torch.equal(averaged, weights) and other != loss


def test_average_has_the_weights_that_its_decay_implies(prepared):
    trainer, _ = build(prepared, Candidate(ema=0.9))
    seen = []
    for step in range(5):
        trainer.step(trainer.batches(step), trainer.learning_rate(step))
        seen.append(trainer.weights.parameters[0].detach().clone())
    powers = torch.tensor([0.9**age for age in (4, 3, 2, 1, 0)])
    expected = torch.einsum("n,nij->ij", powers / powers.sum(), torch.stack(seen))
    torch.testing.assert_close(trainer._mean[0], expected)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
def test_decay_that_follows_the_rate_is_the_optimizers(prepared, precision, optimizer):
    options = {"train.precision": precision, "train.optimizer": optimizer, "train.steps": 8}
    own, _ = train(prepared, **options)
    follows = Candidate(decay=lambda progress, share: share)
    outside, _ = train(prepared, follows, **options)
    without, _ = train(prepared, **options | NONE)
    assert (own - outside).norm() < 1e-4 * (own - without).norm()
    off, _ = train(prepared, Candidate(decay=lambda progress, share: 0.0), **options)
    assert torch.equal(off, without)


def test_epochs_share_what_the_candidate_names(prepared):
    plain, order, batches = (
        build(prepared, Candidate(epochs_share=shared), **{"train.batch_size": 1})[0]
        for shared in ("nothing", "order", "batches")
    )
    n = plain._batches.windows_per_epoch
    assert n > 20
    per_epoch = n // plain.params.windows

    def first_tokens(trainer, step):
        return torch.cat([x for x, _ in trainer.batches(step)])

    for step in range(per_epoch):
        ours = first_tokens(batches, step)
        assert torch.equal(ours, first_tokens(plain, step))
        assert torch.equal(ours, first_tokens(batches, step + 3 * per_epoch))
        assert torch.equal(ours, first_tokens(order, step))
    starts = [order._batches._window_starts(epoch, range(n)).tolist() for epoch in (0, 1, 2)]
    assert starts[0] == starts[1] == starts[2]
    assert starts[0] == plain._batches._window_starts(0, range(n)).tolist()
    assert starts[1] != plain._batches._window_starts(1, range(n)).tolist()


def test_schedules_start_at_the_peak_and_end_at_zero(prepared):
    for name in ("linear decay", "constant, then decay in the last 20 %"):
        trainer, _ = build(prepared, CANDIDATES[name], **{"train.warmup_steps": 3})
        peak, rates = trainer.params.learning_rate, [trainer.learning_rate(i) for i in range(24)]
        assert rates[:4] == pytest.approx([peak / 3, peak * 2 / 3, peak, peak])
        assert rates[-1] == 0 and sorted(rates[3:], reverse=True) == rates[3:]
        middle = peak if "constant" in name else peak / 2
        assert rates[13] == pytest.approx(middle)


def test_candidates_are_compared_in_a_table(prepared, monkeypatch, capsys):
    words = ["--steps", "5", "--seeds", "1,2", "--only", "EMA 0.998, rate floor 0.3"]
    monkeypatch.setattr(sys, "argv", ["candidates", *words])
    monkeypatch.setattr(
        recipe, "in_processes", lambda function, tasks, _: [function(*task) for task in tasks]
    )
    with inside(prepared):
        candidates.main()
    lines = capsys.readouterr().out.splitlines()
    assert [line.split("seed ")[1] for line in lines[1:5]] == [
        *("1: none", "2: none"),
        *("1: EMA 0.998, rate floor 0.3", "2: EMA 0.998, rate floor 0.3"),
    ]
    means = [sum(float(line.split()[0]) for line in lines[at : at + 2]) / 2 for at in (1, 3)]
    name, mean, difference = lines[-1].strip("| ").split(" | ")
    assert name == "EMA 0.998, rate floor 0.3" and float(mean) == pytest.approx(means[1], abs=2e-4)
    assert float(difference) == pytest.approx(means[1] - means[0], abs=3e-4)
