"""The training state: model, optimizer, batches, history and best weights, which are saved and
resumed together."""

import contextlib
import math
from pathlib import Path
from typing import Any

import torch

from folio import device
from folio.distributed import ONE_PROCESS, Group
from folio.errors import UserError
from folio.gpt.model import GPT, ModelParams
from folio.gpt.validation import token_losses
from folio.progress import Track, untracked
from folio.tokens import vocabulary
from folio.tokens.batches import Batches
from folio.tokens.token_files import TokenData
from folio.training import checkpoint, optimizer_state, optimizers, schedule, weights
from folio.training.checkpoint import Checkpoint
from folio.training.early_stopping import EarlyStopping
from folio.training.history import History
from folio.training.micro_batches import micro_batches
from folio.training.params import TrainParams
from folio.training.pretrained import PretrainedWeights
from folio.training.step import NonFiniteError, StepStats, TrainStep
from folio.training.teachers import TeacherFolders, Teachers

# If train.compile is auto, a model that the fused kernels do not support is compiled when training
# takes at least this many operations (6 per parameter and token): compiling takes some 20 s and
# then saves an eighth of each step. An H200 computes this many in three minutes.
_LONG = 6e16


class Trainer:
    def __init__(
        self,
        model_params: ModelParams,
        params: TrainParams,
        data: TokenData,
        where: torch.device,
        precision: str,
        pretrained: PretrainedWeights | None,  # None: random weights
        group: Group = ONE_PROCESS,
        teachers: TeacherFolders | None = None,
    ):
        """All processes of the group must pass the same arguments, except for the device."""
        device.seed(params.seed)
        size = data.meta["vocabulary"]
        self.params, self.data, self.device, self.precision = params, data, where, precision
        self.pretrained, self.group, self.teachers = pretrained, group, teachers
        params.check_processes(group.count)
        self._micro_batches = micro_batches(params.windows, params.batch_size, group)
        self.vocabulary = (
            vocabulary.tied_vocabulary(data.trained_counts)
            if params.tie_unseen_tokens
            else vocabulary.full_vocabulary(size)
        )
        model = GPT(model_params, self.vocabulary.rows, self.vocabulary.multiplicity).to(where)
        model.gradient_checkpointing = params.gradient_checkpointing
        model.unseen_probability = params.unseen_probability
        model.distill_weight = params.distill_weight
        if pretrained:
            model.load_state_dict(pretrained.weights(model_params, size))
        self.weights = weights.place(model, precision, params, group)
        self.optimizer = optimizers.build(self.weights, params, self.vocabulary)
        self._step = TrainStep(
            *(self.weights, self.optimizer, params.grad_clip),
            compiled=self._wants_compile(),
            exact=params.deterministic,
            windows=params.windows,
            input_noise=params.input_noise,
            teachers=self._load_teachers(),
            fused=params.compile != "never",
            fp8_head=params.fp8_head,
        )
        rows = self.vocabulary.row if self.vocabulary.multiplicity is not None else None
        self._batches = Batches(
            *(data.train, model_params.block_size, params.seed, where, rows, data.segmented)
        )
        self._val = self.vocabulary.rows_of(data.val)
        self.steps_done = 0  # optimizer updates
        self.history = History()
        self.early_stopping = EarlyStopping(params.patience, keep_weights=params.keep == "best")

    def _load_teachers(self) -> Teachers | None:
        if not self.teachers:
            return None
        context = self.model.params.block_size
        return self.teachers.load(self.vocabulary, context, self.device, self.precision)

    @property
    def model(self) -> GPT:
        return self.weights.model

    @property
    def tokens_per_step(self) -> int:
        return self.params.windows * self.model.params.block_size

    @property
    def tokens_per_epoch(self) -> int:
        """The number of training tokens that each epoch goes through."""
        used = self.params.overfit_batches or math.inf
        return int(min(used * self.tokens_per_step, len(self.data.train)))

    @property
    def kept_weights(self) -> dict[str, torch.Tensor]:
        """The weights for models/gpt2, by name; of sharded ones, the part in this process."""
        best = self.early_stopping
        return best.best_weights if best.keep_weights else self.weights.state()

    @property
    def stability_hint(self) -> str:
        """What to do if a value is not finite."""
        if self.params.optimizer == "muon":  # whose updates do not depend on the gradients' size
            rates = "train.learning_rate or train.muon_learning_rate"
        else:
            rates = "train.learning_rate or train.grad_clip"
        precision = "" if self.precision == "fp32" else ", or set train.precision to fp32"
        precision = ", or set train.fp8_head to false" if self.params.fp8_head else precision
        return f"lower {rates}{precision}"

    @property
    def finished(self) -> bool:
        """Whether training is complete, including the last row of the history."""
        return self.history.last_step >= self.params.steps or self.early_stopping.triggered

    @property
    def evaluation_is_due(self) -> bool:
        return (
            self.steps_done % self.params.eval_interval == 0 or self.steps_done == self.params.steps
        )

    def row_is_due(self, log_interval: int) -> bool:
        """Whether the history needs a row for this step and does not have it yet.

        A repeated step needs one if it had one before, even if log_interval has changed since:
        otherwise MLflow would contain points that are missing from the history.
        """
        step = self.steps_done
        is_log_point = step % log_interval == 0 or self.evaluation_is_due
        return (is_log_point or self.history.is_replayed(step)) and step > self.history.last_step

    def batches(self, step: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """This process's micro-batches (x, y), [B, T], of update number `step`, from 0."""
        if self.params.overfit_batches:
            step %= self.params.overfit_batches
        first = step * self.params.windows
        return [self._batches.windows(first + at, count) for at, count in self._micro_batches]

    def learning_rate(self, step: int) -> float:
        """The learning rate of update number `step`, counted from 0."""
        p = self.params
        return schedule.learning_rate(
            step, p.learning_rate, p.min_learning_rate, p.warmup_steps, p.steps
        )

    def step(self, batches: list[tuple[torch.Tensor, torch.Tensor]], learning_rate: float) -> None:
        """Forward, backward, clip, update. Does not wait for the device, which may lag behind."""
        device.seed_step(self.params.seed, self.steps_done, self.device, self.group.rank)
        self._step(batches, learning_rate)
        self.steps_done += 1

    def read(self) -> dict[str, float]:
        """Wait for the device, and return the metrics of the steps since the last row.

        Raises NonFiniteError after a step whose loss or gradient was not finite; then the weights
        and `steps_done` are those of the last finite step.
        """
        stats = self._wait()
        return {
            "train_loss": stats.loss / stats.steps,
            "learning_rate": self.learning_rate(self.steps_done - 1),
            "grad_norm": stats.norm / max(1, stats.norms),
        }

    def validate(self, track: Track = untracked) -> float:
        """The validation loss in nats/token. Raises UserError if it is not finite."""
        losses = token_losses(
            self.model, self._val, track=track, description="validation", group=self.group
        )
        loss = float(losses.mean())
        if not math.isfinite(loss):
            hint = self.stability_hint if self.steps_done else "choose another train.init_from"
            self.group.silence_others()
            raise UserError(f"step {self.steps_done}: the validation loss is not finite; {hint}")
        return loss

    def log(self, metrics: dict[str, float]) -> None:
        """Append the row for this step to the history, and reset the sums for the next row."""
        self.history.add(self.steps_done, metrics)
        self._step.reset()

    def save(self, folder: Path) -> None:
        """Write a checkpoint, then the history, whose rows can then be sent to MLflow."""
        tensors, optimizer = optimizer_state.save(self.optimizer)
        best = self.early_stopping
        parts = {
            "model": self.weights.state(),
            "optimizer": tensors,
            "step": self._step.state_dict(),
            "best": best.best_weights if best.best_step != self.steps_done else {},
        }
        named = {f"{part}.{name}": t for part, found in parts.items() for name, t in found.items()}
        state = {
            "optimizer": optimizer,
            "history": self.history.rows,
            "early_stopping": best.state_dict(),
            "machine": self._machine,
        }
        found = Checkpoint(self.steps_done, named, state, self._rows(parts))
        checkpoint.save(folder, found, self.group, self.weights.mesh)
        with self.group.agreeing():
            if self.group.is_main:
                self.history.save(folder)

    def save_last_finite(self, folder: Path) -> None:
        """Like `save`, but also works after a step that was not finite."""
        with contextlib.suppress(NonFiniteError):
            self._wait()
        self.save(folder)

    def resume(self, folder: Path) -> None:
        """Continue from the newest undamaged checkpoint, if there is one."""
        found = checkpoint.load_latest(folder, self.group, self.weights.mesh)
        if not found:
            self.history.restore([], 0, folder)
            return
        state: dict[str, Any] = found.state
        try:
            self.weights.load(found.part("model"))
        except RuntimeError:
            raise UserError(
                f"the checkpoint of step {found.step} is for a different model (the code has"
                " changed): remove .checkpoints to start over"
            ) from None
        optimizer_state.restore(self.optimizer, found.part("optimizer"), state["optimizer"])
        self._step.load_state_dict(found.part("step"))
        self.steps_done = found.step
        self.history.restore(state["history"], found.step, folder)
        best_step = state["early_stopping"]["best_step"]
        is_apart = best_step != found.step or not self.early_stopping.keep_weights
        weights = found.part("best" if is_apart else "model")
        self.early_stopping.load_state_dict(state["early_stopping"], weights)
        if state["machine"] != self._machine and self.group.is_main:
            print(
                f"the checkpoint was made {state['machine']}, but this run is {self._machine}:"
                " the weights will not be bitwise identical to those of a run on a single machine"
            )

    def _rows(self, parts: dict[str, dict[str, torch.Tensor]]) -> dict[str, int]:
        """For Checkpoint.rows: weights, and the optimizer's tensors that are shaped like them."""
        rows = dict(zip(self.weights.state(), self.weights.rows(), strict=True))
        named = {f"{part}.{name}": rows[name] for part in ("model", "best") for name in parts[part]}
        names = {id(tensor): name for name, tensor in parts["optimizer"].items()}
        for p, count in zip(self.weights.parameters, self.weights.rows(), strict=True):
            for value in self.optimizer.state.get(p, {}).values():
                if id(value) in names and value.shape == p.shape:
                    named[f"optimizer.{names[id(value)]}"] = count
        return named

    def _wait(self) -> StepStats:
        stats = self._step.read()
        self.steps_done = self.history.last_step + stats.steps
        if stats.problem:
            raise NonFiniteError(f"the {stats.problem} is not finite")
        return stats

    def _wants_compile(self) -> bool:
        """Whether to compile the model, if possible and if the kernels are not fused."""
        if self.params.compile != "auto":
            return self.params.compile == "always"
        parameters = sum(p.numel() for p in self.model.parameters())  # of shards: all of them
        return 6 * parameters * self.tokens_per_step * self.params.steps > _LONG

    @property
    def machine(self) -> str:
        """The accelerator, or "cpu" with the number of threads; with the number of processes."""
        number = f"{self.group.count} x " if self.group.count > 1 else ""
        return f"{number}{device.describe(self.device)}{self.weights.description}"

    @property
    def _machine(self) -> str:
        """The device, precision and software that bitwise reproducibility depends on."""
        where = f"on {self.machine} in {self.precision}"
        kernels = ", fused kernels" if self.weights.fused else ""
        kernels = ", compiled" if self.weights.compiled else kernels
        return f"{where} with PyTorch {torch.__version__}{kernels}"
