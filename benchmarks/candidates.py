"""Measures training methods that Folio does not have: what would each of them gain?

Trains a variant with each candidate and seed, prints a row for each training as it ends, then a
table with the mean of each candidate over the seeds, and its difference from the plain recipe:

    python -m benchmarks.candidates --variant best-30m --corpus tinyshakespeare-development
    python -m benchmarks.candidates --variant best-30m --seeds 1,2,3,4 --jobs 4 --only "EMA 0.99"

The validation loss is that of the last step. Options as in benchmarks.recipe.
"""

import argparse
import functools
import tempfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import Any, Literal

import torch

from benchmarks import recipe
from folio.errors import one_line_errors
from folio.progress import Track, untracked
from folio.training.trainer import Trainer

PLAIN = "none"


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """A change of the recipe. `share`: of the peak learning rate; `progress`: from 0 to 1."""

    ema: float | None = None  # decay of an exponential moving average of the weights
    floor: float = 0.0  # share at the end of the cosine decay, if not 0
    schedule: Callable[[float], float] | None = None  # the share, given the progress after warm-up
    # What the product of the peak rate and the weight decay is multiplied by, given the progress
    # and the share. The optimizer itself multiplies it by the share.
    decay: Callable[[float, float], float] | None = None
    # What the first epoch shares with all others: the offset and the order of its windows, or also
    # the segmentation of each window.
    epochs_share: Literal["nothing", "order", "batches"] = "nothing"


CANDIDATES = {
    PLAIN: Candidate(),
    "EMA 0.99": Candidate(ema=0.99),
    "EMA 0.998": Candidate(ema=0.998),
    "EMA 0.998, rate floor 0.3": Candidate(ema=0.998, floor=0.3),
    "same order in each epoch": Candidate(epochs_share="order"),
    "same order and segmentations in each epoch": Candidate(epochs_share="batches"),
    "linear decay": Candidate(schedule=lambda progress: 1 - progress),
    "constant, then decay in the last 20 %": Candidate(
        schedule=lambda progress: min(1.0, (1 - progress) / 0.2)
    ),
    "weight decay rising 0 to 2x": Candidate(decay=lambda progress, share: 2 * progress * share),
    "weight decay falling 2x to 0": Candidate(
        decay=lambda progress, share: 2 * (1 - progress) * share
    ),
    "weight decay without the learning rate's schedule": Candidate(
        decay=lambda progress, share: 1.0
    ),
}


class CandidateTrainer(Trainer):
    """A Trainer with a candidate. All of it runs before or after a step, and outside of the step's
    CUDA graph."""

    def __init__(self, candidate: Candidate, *args: Any, **options: Any):
        super().__init__(*args, **options)
        self.candidate = candidate
        if candidate.epochs_share == "order":
            starts = self._batches._window_starts  # of an epoch
            setattr(self._batches, "_window_starts", lambda _, at: starts(0, at))  # noqa: B010
        self._mean = _copies(self.weights.parameters) if candidate.ema is not None else []
        # The parameters that the optimizer would decay, their values before a step, and the product
        # of their peak rate and decay.
        self._decayed: list[tuple[list[torch.Tensor], list[torch.Tensor], float]] = []
        for group in self.optimizer.param_groups if candidate.decay else []:
            if group["weight_decay"]:
                peak = self.params.learning_rate * group.get("lr_scale", 1.0)
                parameters, decay = group["params"], group["weight_decay"]
                self._decayed.append((parameters, _copies(parameters), peak * decay))
                group["weight_decay"] = 0.0

    def batches(self, step: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
        if self.candidate.epochs_share == "batches":
            step %= max(1, self._batches.windows_per_epoch // self.params.windows)
        return super().batches(step)

    def learning_rate(self, step: int) -> float:
        p, after = self.params, step - self.params.warmup_steps
        if not self.candidate.schedule or after < 0:
            return super().learning_rate(step)
        share = self.candidate.schedule(after / max(1, p.steps - 1 - p.warmup_steps))
        return p.min_learning_rate + (p.learning_rate - p.min_learning_rate) * share

    def step(self, batches: list[tuple[torch.Tensor, torch.Tensor]], learning_rate: float) -> None:
        with torch.no_grad():
            for parameters, before, _ in self._decayed:
                torch._foreach_copy_(before, parameters)
        super().step(batches, learning_rate)
        with torch.no_grad():
            self._decay(learning_rate)
            if self._mean:  # without a bias to the first weights (Kingma and Ba 2015, section 3)
                decay = self.candidate.ema or 0.0
                share = (1 - decay) / (1 - decay**self.steps_done)
                torch._foreach_lerp_(self._mean, list(self.weights.parameters), share)

    def _decay(self, learning_rate: float) -> None:
        """Subtract from the updated master weights what the optimizer's decay would have: a part of
        the weights before the update. Then refresh their copy in half precision."""
        if self.candidate.decay:
            progress = (self.steps_done - 1) / max(1, self.params.steps - 1)
            factor = self.candidate.decay(progress, learning_rate / self.params.learning_rate)
            for parameters, before, amount in self._decayed:
                torch._foreach_add_(parameters, before, alpha=-amount * factor)
            self.weights.sync_from_master()

    @torch.no_grad()
    def validate(self, track: Track = untracked) -> float:
        if self._mean and self.steps_done == self.params.steps:
            torch._foreach_copy_(list(self.weights.parameters), self._mean)
        return super().validate(track)


def _copies(tensors: Iterable[torch.Tensor]) -> list[torch.Tensor]:
    return [tensor.detach().clone() for tensor in tensors]


def measure(settings: recipe.Settings, name: str, tokens: Path) -> float:
    """Train with a candidate. Call it in a process of its own. Returns the validation loss."""
    make_trainer = functools.partial(CandidateTrainer, CANDIDATES[name])
    shown = f"seed {settings['train.seed']}: {name}"
    return recipe.measure(settings, shown, tokens, make_trainer)[0]


def settings_of(name: str, base: recipe.Settings, seed: int) -> recipe.Settings:
    """The settings of a training, which has a single evaluation, after its last step."""
    train = recipe.apply(base)["train"]
    changed = {"train.seed": seed, "train.eval_interval": train["steps"]}
    if floor := CANDIDATES[name].floor:
        changed["train.min_learning_rate"] = floor * train["learning_rate"]
    return base | changed


def table(names: list[str], losses: list[list[float]]) -> str:
    """losses: [candidate][seed], those of the plain recipe first."""
    lines = ["| candidate | mean validation loss | difference |", "|---|---|---|"]
    for name, row in zip(names, losses, strict=True):
        lines.append(f"| {name} | {mean(row):.4f} | {mean(row) - mean(losses[0]):+.4f} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=_numbers, default=[1, 2], help="such as 1,2")
    parser.add_argument("--steps", type=int, help="instead of those of the variant")
    shown = "some of CANDIDATES, as in the table; the plain recipe is always trained"
    parser.add_argument("--only", nargs="+", choices=CANDIDATES, metavar="NAME", help=shown)
    options, base = recipe.parse(parser)
    if options.steps is not None:
        base["train.steps"] = options.steps
    names = [name for name in CANDIDATES if name in {PLAIN, *(options.only or CANDIDATES)}]
    runs = [(name, settings_of(name, base, seed)) for name in names for seed in options.seeds]
    for _, settings in runs:
        recipe.check(settings)
    with tempfile.TemporaryDirectory() as root:
        tokens = recipe.prepare_text(base, Path(root))
        print(recipe.HEAD, flush=True)
        tasks = [(settings, name, tokens) for name, settings in runs]
        losses = recipe.in_processes(measure, tasks, options.jobs)
    count = len(options.seeds)
    print(table(names, [losses[at : at + count] for at in range(0, len(losses), count)]))


def _numbers(text: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r}: give numbers such as 1,2,3") from None


if __name__ == "__main__":
    with one_line_errors():
        main()
