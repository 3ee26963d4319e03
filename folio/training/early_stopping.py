"""Early stopping: remembers the best evaluation so far, and stops when there is no better one."""

import math
from typing import Any

import torch


class EarlyStopping:
    """Keeps the weights with the lowest validation loss in memory, on the model's device."""

    def __init__(self, patience: int | None, keep_weights: bool = True):
        """patience: stop after this many evaluations without improvement; None: never stop.

        keep_weights: if false, only the loss and the step of the best evaluation are kept.
        """
        self.patience, self.keep_weights = patience, keep_weights
        self.best_loss, self.best_step = math.inf, 0  # nats/token
        self.best_weights: dict[str, torch.Tensor] = {}
        self.evals_since_best = 0

    @property
    def triggered(self) -> bool:
        return self.patience is not None and self.evals_since_best >= self.patience

    def update(self, loss: float, step: int, weights: dict[str, torch.Tensor]) -> None:
        """Record the validation loss of the weights after `step` updates."""
        if loss < self.best_loss:
            self.best_loss, self.best_step, self.evals_since_best = loss, step, 0
            if self.keep_weights:
                self.best_weights = {name: weight.clone() for name, weight in weights.items()}
        else:
            self.evals_since_best += 1

    def state_dict(self) -> dict[str, Any]:
        """Everything except the weights."""
        names = ("best_loss", "best_step", "evals_since_best")
        return {name: getattr(self, name) for name in names}

    def load_state_dict(self, state: dict[str, Any], best_weights: dict[str, torch.Tensor]) -> None:
        for name, value in state.items():
            setattr(self, name, value)
        self.best_weights = best_weights
