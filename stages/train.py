"""Train: token files to models/gpt2, the best weights as a Hugging Face folder."""

import hashlib
import json
import math
import shutil
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import torch
from tqdm import tqdm

from folio import (
    checkpoint,
    device,
    files,
    huggingface,
    optim,
    params,
    pictures,
    tokens,
    tracking,
    vocabulary,
)
from folio.checkpoint import Checkpoint
from folio.errors import UserError, one_line_errors
from folio.loss import token_losses
from folio.model import GPT, ModelParams, parameter_report
from folio.runtime import RuntimeParams
from folio.step import NonFiniteError, Step

_WAY_OUT = "lower train.learning_rate or train.grad_clip, or take train.precision fp32"


@dataclass(frozen=True, kw_only=True)
class TrainParams:
    seed: Annotated[int, ">= 0"]  # of the weights, the order of the data and dropout
    steps: Annotated[int, ">= 1"]  # optimizer updates at most
    batch_size: Annotated[int, ">= 1"]  # windows of block_size tokens in a micro-batch
    accumulation: Annotated[int, ">= 1"]  # micro-batches an update
    precision: device.Precision  # auto: bf16 on a GPU that has it, else fp32
    gradient_checkpointing: bool  # compute activations twice, to hold fewer of them
    tie_unseen_tokens: bool  # one embedding row for all tokens that never occur in training
    learning_rate: Annotated[float, "> 0"]  # at its peak
    min_learning_rate: Annotated[float, ">= 0"]  # at the end of the cosine
    warmup_steps: Annotated[int, ">= 0"]  # updates of linear warm-up
    weight_decay: Annotated[float, ">= 0"]  # of matrices and embeddings alone
    beta1: Annotated[float, ">= 0, < 1"]  # AdamW: decay of the mean gradient
    beta2: Annotated[float, ">= 0, < 1"]  # AdamW: decay of the mean squared gradient
    grad_clip: Annotated[float, "> 0"]  # the gradient's norm at most
    eval_interval: Annotated[int, ">= 1"]  # updates between evaluations on the held-out text
    patience: Annotated[int | None, ">= 1"]  # evaluations without a better one; null: never stop

    def __post_init__(self):
        if self.warmup_steps >= self.steps:
            raise ValueError(f"warmup_steps: {self.warmup_steps} leaves no step of {self.steps}")
        if self.min_learning_rate > self.learning_rate:
            raise ValueError(f"min_learning_rate: is above learning_rate {self.learning_rate}")


def main() -> None:
    model, train, runtime = params.load(model=ModelParams, train=TrainParams, runtime=RuntimeParams)
    run(model, train, runtime, Path.cwd(), tracking.project_root())


def run(
    model_params: ModelParams,
    train_params: TrainParams,
    runtime: RuntimeParams,
    root: Path,
    project: Path,
) -> None:
    """Train on root/data/prepared and write root/models; checkpoints and MLflow are in project."""
    where = device.resolve_device(runtime.device)
    precision = device.resolve_precision(train_params.precision, where)
    data = tokens.read(root / "data/prepared")
    tokens.check_length(data.train, "training", model_params.block_size)
    tokens.check_length(data.val, "validation", model_params.block_size)
    key = train_key(model_params, train_params, data.digest)
    folder = project / ".checkpoints" / key
    with checkpoint.only_trainer(folder):
        trainer = Trainer(model_params, train_params, data, where, precision)
        trainer.resume(folder)
        report = parameter_report(trainer.model)
        print(_describe(trainer, report))
        with tracking.Run(
            runtime.tracking_uri,
            name=f"{model_params.n_layer}x{model_params.n_head}x{model_params.n_embd}-{key[:6]}",
            params=params.flatten(model=model_params, train=train_params)
            | _facts(data, root, report),
            tags={"train_key": key, "data_digest": data.digest, "precision": precision}
            | {"device": device.describe(where)},
            memo=folder / "run_id",
            system_metrics=runtime.system_metrics,
        ) as tracked:
            tracked.dataset(data.meta["corpus"], data.digest, "stages/prepare.py")
            trainer.train(folder, runtime, tracked)
            _write_outs(trainer, folder, root, tracked, key)
        shutil.rmtree(folder)


def train_key(model: ModelParams, train: TrainParams, data_digest: str) -> str:
    """What a variant is: sha256 (hex, its first 16) of what the weights depend on."""
    what = json.dumps([asdict(model), asdict(train), data_digest], sort_keys=True)
    return hashlib.sha256(what.encode()).hexdigest()[:16]


class Trainer:
    """The training state, and the loop over it."""

    def __init__(
        self,
        model_params: ModelParams,
        p: TrainParams,
        data: tokens.Tokens,
        where: torch.device,
        precision: str,
    ):
        device.seed(p.seed)
        size = data.meta["vocabulary"]
        self.p, self.data, self.device, self.precision = p, data, where, precision
        self.vocabulary = (
            vocabulary.tokens_that_occur(data.train, size)
            if p.tie_unseen_tokens
            else vocabulary.every_token(size)
        )
        self.model = GPT(model_params, self.vocabulary.rows, self.vocabulary.multiplicity).to(where)
        self.model.gradient_checkpointing = p.gradient_checkpointing
        self.optimizer = optim.adamw(self.model, p.weight_decay, (p.beta1, p.beta2))
        self.take_step = Step(self.model, self.optimizer, where, precision, p.grad_clip)
        train = self.vocabulary.rows_of(data.train)
        self.batches = tokens.Batches(train, model_params.block_size, p.batch_size, p.seed)
        self.val = self.vocabulary.rows_of(data.val)
        self.step = 0  # updates done
        self.history: list[dict[str, Any]] = []  # a row a log point
        self.best: tuple[float, int] = (math.inf, 0)  # held-out loss, step
        self.worse = 0  # evaluations since the best

    @property
    def tokens_a_step(self) -> int:
        return self.p.batch_size * self.p.accumulation * self.model.params.block_size

    @property
    def finished(self) -> bool:
        patience = self.p.patience
        return self.step >= self.p.steps or (patience is not None and self.worse >= patience)

    def train(self, folder: Path, runtime: RuntimeParams, tracked: tracking.Run) -> None:
        """The loop: one step, and once in a while log, evaluate and save."""
        losses, norms, started, saved = [], [], time.perf_counter(), time.monotonic()
        hidden = None if runtime.progress else True  # None: shown where there is a terminal
        with tqdm(total=self.p.steps, initial=self.step, unit="step", disable=hidden) as bar:
            while not self.finished:
                loss, norm, rate = self.advance()
                losses.append(loss)
                norms += [norm] if math.isfinite(norm) else []  # fp16: an overflow, passed over
                bar.update()

                evaluating = self.step % self.p.eval_interval == 0 or self.step == self.p.steps
                if not evaluating and self.step % runtime.log_interval:
                    continue
                speed = self.tokens_a_step * len(losses) / (time.perf_counter() - started)
                row = {
                    "train_loss": sum(losses) / len(losses),
                    "learning_rate": rate,
                    "grad_norm": sum(norms) / max(1, len(norms)),
                    "tokens_per_second": speed,
                }
                bar.set_postfix_str(f"loss {row['train_loss']:.3f}, {speed:,.0f} tokens/s")
                if evaluating:
                    row["val_loss"] = self.evaluate()
                    bar.write(self._line(row))
                self.history.append({"step": self.step, "time": time.time_ns() // 1_000_000} | row)
                if evaluating or time.monotonic() - saved > runtime.checkpoint_seconds:
                    self.save(folder)
                    tracked.ship(self.history)
                    saved = time.monotonic()
                losses, norms, started = [], [], time.perf_counter()
        tracked.ship(self.history)

    def advance(self) -> tuple[float, float, float]:
        """One step: its training loss in nats a token, the gradient's norm, the learning rate."""
        p = self.p
        rate = optim.learning_rate(
            self.step, p.learning_rate, p.min_learning_rate, p.warmup_steps, p.steps
        )
        first = self.step * p.accumulation
        batches = [self.batches[first + i] for i in range(p.accumulation)]
        try:
            loss, norm = self.take_step(batches, rate)
        except NonFiniteError as problem:
            raise UserError(f"step {self.step + 1}: {problem}; {_WAY_OUT}") from None
        self.step += 1
        return loss, norm, rate

    def evaluate(self) -> float:
        """The held-out loss now, in nats a token; keeps count of the best."""
        loss = float(token_losses(self.model, self.val).mean())
        if not math.isfinite(loss):
            raise UserError(f"step {self.step}: the held-out loss is not finite; {_WAY_OUT}")
        if loss < self.best[0]:
            self.best, self.worse = (loss, self.step), 0
        else:
            self.worse += 1
        return loss

    def save(self, folder: Path) -> None:
        tensors, state = checkpoint.capture(self.model, self.optimizer, self.take_step.scaler)
        state |= {"history": self.history, "best": self.best, "worse": self.worse}
        checkpoint.save(folder, Checkpoint(self.step, tensors, state), keep={self.best[1]})

    def resume(self, folder: Path) -> None:
        """Go on from the newest whole checkpoint, where there is one."""
        found = checkpoint.load_latest(folder)
        if found:
            checkpoint.restore(found, self.model, self.optimizer, self.take_step.scaler)
            self.step, self.history = found.step, found.state["history"]
            self.best, self.worse = tuple(found.state["best"]), found.state["worse"]

    def metrics(self) -> dict[str, float]:
        rows = [row for row in self.history if "val_loss" in row]
        return {
            "best_val_loss": self.best[0],
            "best_step": self.best[1],
            "last_val_loss": rows[-1]["val_loss"],
            "last_train_loss": rows[-1]["train_loss"],
            "steps": self.step,
            "epochs": self.step * self.tokens_a_step / len(self.data.train),
            "tokens_per_second": median(row["tokens_per_second"] for row in self.history),
            "parameters": self.model_size,
        }

    @property
    def model_size(self) -> int:
        """Numbers in the model as it is written, each token with a row of its own."""
        width = self.model.params.n_embd
        trained = sum(p.numel() for p in self.model.parameters())
        return trained + (len(self.vocabulary.row) - self.vocabulary.rows) * width

    def _line(self, row: dict[str, Any]) -> str:
        mark = "  best so far" if self.best[1] == self.step else ""
        return (
            f"step {self.step:>6,}  training loss {row['train_loss']:.3f}"
            f"  held-out {row['val_loss']:.3f}{mark}"
        )


def _facts(data: tokens.Tokens, root: Path, report: dict[str, int]) -> dict[str, Any]:
    """What prepare found and how large the model is, as params of the run."""
    file = root / "data/diagnostics.json"
    found = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    found = {"corpus": data.meta["corpus"], "sha256": data.meta["text_sha256"]} | found
    return {f"data.{key}": value for key, value in found.items()} | {
        f"parameters.{part}": count for part, count in report.items()
    }


def _describe(trainer: Trainer, report: dict[str, int]) -> str:
    p, data = trainer.p, trainer.data
    width = max(map(len, report))
    lines = [
        f"{data.meta['corpus']}: {len(data.train):,} training tokens, {len(data.val):,} held out",
        f"on {device.describe(trainer.device)} in {trainer.precision};"
        f" {trainer.tokens_a_step:,} tokens a step, at most {p.steps:,} steps",
        "parameters",
        *(f"  {part:<{width}} {count:>12,}" for part, count in report.items()),
    ]
    if trainer.vocabulary.rows < len(trainer.vocabulary.row):
        lines.append(
            f"  ({trainer.vocabulary.rows:,} embedding rows are trained; written out for all"
            f" {len(trainer.vocabulary.row):,} tokens the model has {trainer.model_size:,})"
        )
    if trainer.step:
        lines.append(f"going on from the checkpoint of step {trainer.step:,}")
    return "\n".join(lines)


def _write_outs(
    trainer: Trainer, folder: Path, root: Path, tracked: tracking.Run, key: str
) -> None:
    best = checkpoint.load(folder, trainer.best[1])
    checkpoint.restore_model(best, trainer.model)
    huggingface.save(trainer.model, root / "models/gpt2", trainer.vocabulary.row)
    out = root / "models/training"
    metrics = trainer.metrics()
    history = trainer.history
    texts = {
        "history.jsonl": "".join(json.dumps(row) + "\n" for row in history),
        "history.csv": _as_csv(history, ["step", "train_loss", "learning_rate"]),
        "held_out.csv": _as_csv(history, ["step", "val_loss"]),
        "metrics.json": json.dumps(metrics, indent=2) + "\n",
        "run.json": json.dumps({"run_id": tracked.id, "train_key": key}, indent=2) + "\n",
    }
    for name, text in texts.items():
        files.write_text(out / name, text)
    pictures.loss_curve(history, out / "loss.png")
    tracked.metrics(metrics, trainer.step)
    tracked.artifacts(root / "data/diagnostics", "data")
    tracked.artifacts(root / "data/diagnostics.json", "data")
    tracked.artifacts(out, "training")
    tracked.artifacts(root / "models/gpt2", "model")


def _as_csv(history: list[dict[str, Any]], columns: list[str]) -> str:
    """The rows that have all the columns, for DVC's plots: they read no JSON lines, and draw an
    empty cell as 0."""
    rows = [[row[column] for column in columns] for row in history if set(columns) <= row.keys()]
    return "".join(",".join(map(str, row)) + "\n" for row in [columns, *rows])


if __name__ == "__main__":
    with one_line_errors():
        main()
