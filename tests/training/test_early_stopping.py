"""The best weights are kept, and training stops after enough evaluations without better ones."""

import torch

from folio.training.early_stopping import EarlyStopping


def test_early_stopping_keeps_the_best_weights():
    model, stopping = torch.nn.Linear(1, 1), EarlyStopping(patience=2)
    for step, loss in enumerate([5.0, 4.0, 4.5]):
        with torch.no_grad():
            model.weight.fill_(step)
        stopping.update(loss, step, model.state_dict())
    assert (stopping.best_loss, stopping.best_step, stopping.evals_since_best) == (4.0, 1, 1)
    assert stopping.best_weights["weight"].item() == 1.0


def test_early_stopping_can_do_without_the_weights():
    model, stopping = torch.nn.Linear(1, 1), EarlyStopping(patience=None, keep_weights=False)
    for step, loss in enumerate([5.0, 4.0, 4.5]):
        stopping.update(loss, step, model.state_dict())
    assert (stopping.best_loss, stopping.best_step, stopping.best_weights) == (4.0, 1, {})


def test_early_stopping_triggers_after_patience_evaluations():
    model, stopping = torch.nn.Linear(1, 1), EarlyStopping(patience=2)
    triggered = []
    for step, loss in enumerate([5.0, 5.0, 4.0, 4.1, 4.0]):  # an equal loss is no better one
        stopping.update(loss, step, model.state_dict())
        triggered.append(stopping.triggered)
    assert triggered == [False, False, False, False, True]


def test_early_stopping_never_triggers_without_patience():
    model, stopping = torch.nn.Linear(1, 1), EarlyStopping(patience=None)
    for step in range(50):
        stopping.update(1.0, step, model.state_dict())
    assert not stopping.triggered and stopping.evals_since_best == 49
