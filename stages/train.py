"""Train: token files to models/gpt2, the best weights as a Hugging Face folder."""

import contextlib
import hashlib
import json
import math
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import median
from typing import Annotated, Any, Literal

import torch
from tqdm import tqdm

from folio import (
    checkpoint,
    device,
    files,
    huggingface,
    lock,
    optim,
    params,
    pictures,
    pretrained,
    records,
    stopping,
    tokens,
    tracking,
    vocabulary,
)
from folio.checkpoint import Checkpoint
from folio.errors import UserError, one_line_errors
from folio.follower import Follower
from folio.loss import token_losses
from folio.model import GPT, ModelParams, parameter_report
from folio.pretrained import Start
from folio.runtime import RuntimeParams
from folio.step import Found, NonFiniteError, Step

# The modules that have a say in the weights, besides this one: when one of them changes, a training
# begins anew instead of going on from what other code has computed.
ARITHMETIC = (
    "compiler",
    "device",
    "head",
    "huggingface",
    "loss",
    "model",
    "optim",
    "pretrained",
    "softmax",
    "step",
    "tokens",
    "vocabulary",
)

# What a checkpoint holds of a Trainer's attributes, besides weights, optimizer and step.
_STATE = ("history", "best", "worse")

# Operations, six a parameter and token, from which on a training gains by compiling: it takes some
# twenty seconds and then saves an eighth of a step. An H200 computes as many in three minutes.
_LONG = 6e16

# To save takes at most one part of so many of a training's time, but for what is done in no time.
_SHARE, _AT_ONCE = 10, 0.2  # ..., seconds

_WAY_OUT = "lower train.learning_rate or train.grad_clip, or take train.precision fp32"

Compile = Literal["auto", "always", "never"]


@dataclass(frozen=True, kw_only=True)
class TrainParams:
    init_from: str  # weights to start from: random, or a GPT-2 folder in data/pretrained
    seed: Annotated[int, ">= 0"]  # of the weights, the order of the data and dropout
    steps: Annotated[int, ">= 1"]  # optimizer updates at most
    batch_size: Annotated[int, ">= 1"]  # windows of block_size tokens in a micro-batch
    accumulation: Annotated[int, ">= 1"]  # micro-batches an update
    precision: device.Precision  # auto: bf16 on a GPU that has it, else fp32
    deterministic: bool  # the same bits from every run; on a GPU a long context costs speed
    compile: Compile  # make kernels for the model; auto: if the training is a long one
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
        if self.tie_unseen_tokens and self.init_from != pretrained.RANDOM:
            raise ValueError(
                "tie_unseen_tokens: set it to false with init_from, whose model has a row of its"
                " own for each token"
            )


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
    device.keep_memory()
    where = device.resolve_device(runtime.device)
    precision = device.resolve_precision(train_params.precision, where)
    data = tokens.read(root / "data/prepared")
    tokens.check_length(data.train, "training", model_params.block_size)
    tokens.check_length(data.val, "validation", model_params.block_size)
    start = pretrained.find(train_params.init_from, root)
    key = train_key(model_params, train_params, data.digest, start)
    folder = project / ".checkpoints" / key
    with lock.only_trainer(folder):
        trainer = Trainer(model_params, train_params, data, where, precision, start)
        trainer.resume(folder)
        report = parameter_report(trainer.model)
        print(_describe(trainer, report))
        record = _record(trainer, folder, report, root)
        with Follower(runtime.tracking_uri, record) as follower:
            trainer.train(folder, runtime, follower)
            if start:
                print(trainer.outcome())
            _write_outs(trainer, record, root)
            follower.finish(records.training(root))


def train_key(model: ModelParams, train: TrainParams, data_digest: str, start: Start | None) -> str:
    """What a variant is: sha256 (hex, its first 16) of what the weights depend on."""
    library = Path(device.__file__).parent
    sources = [Path(__file__), *(library / f"{module}.py" for module in ARITHMETIC)]
    code = [hashlib.sha256(source.read_bytes()).hexdigest() for source in sources]
    weights = start.sha256 if start else None
    what = json.dumps([asdict(model), asdict(train), data_digest, weights, code], sort_keys=True)
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
        start: Start | None,  # None: random weights
    ):
        device.seed(p.seed)
        size = data.meta["vocabulary"]
        self.p, self.data, self.device, self.precision = p, data, where, precision
        self.start = start
        self.vocabulary = (
            vocabulary.tokens_that_occur(data.train, size)
            if p.tie_unseen_tokens
            else vocabulary.every_token(size)
        )
        self.model = GPT(model_params, self.vocabulary.rows, self.vocabulary.multiplicity).to(where)
        self.model.gradient_checkpointing = p.gradient_checkpointing
        if start:
            self.model.load_state_dict(start.weights(model_params, size))
        self.optimizer = optim.adamw(self.model, p.weight_decay, (p.beta1, p.beta2))
        self.take_step = Step(
            *(self.model, self.optimizer, where, precision, p.grad_clip),
            compiled=self.compiles,
            exact=p.deterministic,
        )
        train = self.vocabulary.rows_of(data.train)
        self.batches = tokens.Batches(train, model_params.block_size, p.batch_size, p.seed, where)
        self.val = self.vocabulary.rows_of(data.val)
        self.step = 0  # updates done
        self.history: list[dict[str, Any]] = []  # a row a log point
        self.told: dict[int, dict[str, Any]] = {}  # by step: rows of steps to be done once more
        self.best: tuple[float, int] = (math.inf, 0)  # held-out loss, step
        self.best_weights: dict[str, torch.Tensor] = {}
        self.worse = 0  # evaluations since the best
        self.timed_from = (
            0,
            time.perf_counter(),
        )  # the step from which speed is measured, and when

    @property
    def tokens_a_step(self) -> int:
        return self.p.batch_size * self.p.accumulation * self.model.params.block_size

    @property
    def compiles(self) -> bool:
        """Whether kernels are to be made for the model, where that is possible."""
        if self.p.compile != "auto":
            return self.p.compile == "always"
        parameters = sum(p.numel() for p in self.model.parameters())
        return 6 * parameters * self.tokens_a_step * self.p.steps > _LONG

    @property
    def finished(self) -> bool:
        patience = self.p.patience
        return self.step >= self.p.steps or (patience is not None and self.worse >= patience)

    def train(self, folder: Path, runtime: RuntimeParams, follower: Follower) -> None:
        """The loop: one step, and once in a while log, evaluate and save.

        It saves after an evaluation, unless that would take more than a tenth of the time. Told to
        stop, it saves where it is and raises Stopped.
        """
        load = tracking.Load() if runtime.system_metrics else None
        hidden = None if runtime.progress else True  # None: shown where there is a terminal
        bar = tqdm(total=self.p.steps, initial=self.step, unit="step", disable=hidden)
        saved, cost = time.monotonic(), 0.0
        try:
            with bar, stopping.deferred():
                if self.start and not self.history:
                    self.log_start(bar)
                self.timed_from = (self.step, time.perf_counter())
                while True:
                    stopping.check()
                    if self.wants_row(runtime.log_interval):
                        row = self.log(self.check(), bar, load)
                        now = time.monotonic()
                        wait = cost if "val_loss" in row else runtime.checkpoint_seconds
                        if now - saved >= wait or self.finished:
                            self.save(folder)
                            follower.follow(self.history)
                            saved = time.monotonic()
                            cost = _SHARE * max(0, saved - now - _AT_ONCE)
                        self.timed_from = (self.step, time.perf_counter())
                    if self.finished:
                        return
                    self.advance()
                    bar.update()
        except NonFiniteError as problem:
            self.save(folder)
            raise UserError(f"step {self.step + 1}: {problem}; {_WAY_OUT}") from None
        except stopping.Stopped:
            with contextlib.suppress(NonFiniteError):
                self.check()
            self.save(folder)
            follower.follow(self.history)
            left = f"step {self.step:,} is saved, and the same command goes on from there"
            raise stopping.Stopped(left) from None

    def advance(self) -> None:
        """One step, not waited for; all that is random in it depends on its number alone."""
        p, first = self.p, self.step * self.p.accumulation
        device.seed_step(p.seed, self.step, self.device)
        batches = [self.batches[first + i] for i in range(p.accumulation)]
        self.take_step(batches, self.rate(self.step))
        self.step += 1

    @property
    def last_row(self) -> int:
        """The step of the newest row."""
        return self.history[-1]["step"] if self.history else 0

    def check(self) -> Found:
        """Wait for the device, and tell what the steps since the last row have found. Raises
        NonFiniteError at the last step before what is not finite, where the weights are."""
        found = self.take_step.read()
        self.step = self.last_row + found.steps
        if found.problem:
            raise NonFiniteError(f"the {found.problem} is not finite")
        return found

    def rate(self, step: int) -> float:
        """The learning rate of update number `step`, from 0."""
        p = self.p
        return optim.learning_rate(
            step, p.learning_rate, p.min_learning_rate, p.warmup_steps, p.steps
        )

    @property
    def is_evaluation(self) -> bool:
        return self.step % self.p.eval_interval == 0 or self.step == self.p.steps

    def wants_row(self, log_interval: int) -> bool:
        """Whether there is to be a row of this step, and is none yet."""
        return self.step > self.last_row and (self.is_evaluation or self.step % log_interval == 0)

    def log(self, found: Found, bar: tqdm, load: tracking.Load | None) -> dict[str, Any]:
        """Add a row of the steps since the last one to the history, and return it."""
        row = {
            "train_loss": found.loss / found.steps,
            "learning_rate": self.rate(self.step - 1),
            "grad_norm": found.norm / max(1, found.norms),
        }
        since, started = self.timed_from
        if self.step > since:  # else just resumed
            speed = self.tokens_a_step * (self.step - since) / (time.perf_counter() - started)
            row["tokens_per_second"] = speed
            bar.set_postfix_str(f"loss {row['train_loss']:.3f}, {speed:,.0f} tokens/s")
        if self.is_evaluation:
            with stopping.allowed():  # nothing has changed when it is left half-way
                row["val_loss"] = self.evaluate()
            self._compare(row["val_loss"])
            bar.write(self._line(row))
        row = {"step": self.step, "time": records.now()} | row | (load.read() if load else {})
        # A step done once more, after a damaged checkpoint, keeps the row that MLflow has of it.
        row = self.told.pop(self.step, row)
        self.history.append(row)
        self.take_step.reset()
        return row

    def log_start(self, bar: tqdm) -> None:
        """Add the first row to the history: what the weights that it starts from do by themselves.
        They are the best until a step does better."""
        with stopping.allowed():
            row = {"val_loss": self.evaluate()}
        self._compare(row["val_loss"])
        self.history.append({"step": 0, "time": records.now()} | row)
        bar.write(f"step      0  before training      held-out {row['val_loss']:.3f}")

    def evaluate(self) -> float:
        """The held-out loss now, in nats a token."""
        loss = float(token_losses(self.model, self.val).mean())
        if not math.isfinite(loss):
            way_out = _WAY_OUT if self.step else "take another train.init_from"
            raise UserError(f"step {self.step}: the held-out loss is not finite; {way_out}")
        return loss

    def _compare(self, loss: float) -> None:
        if loss < self.best[0]:
            self.best, self.worse = (loss, self.step), 0
            self.best_weights = {
                name: weight.clone() for name, weight in self.model.state_dict().items()
            }
        else:
            self.worse += 1

    def save(self, folder: Path) -> None:
        """A checkpoint, then the history that MLflow may be told."""
        tensors = checkpoint.capture(self.model, self.optimizer, self.take_step)
        if self.best[1] != self.step:
            tensors |= {f"best.{name}": weight for name, weight in self.best_weights.items()}
        state = {name: getattr(self, name) for name in _STATE} | {"made_by": self._made_by}
        checkpoint.save(folder, Checkpoint(self.step, tensors, state))
        records.write_history([*self.history, *self.told.values()], folder / "history.jsonl")

    def resume(self, folder: Path) -> None:
        """Go on from the newest whole checkpoint, where there is one."""
        found = checkpoint.load_latest(folder)
        if not found:
            return
        checkpoint.restore(found, self.model, self.optimizer, self.take_step)
        self.step = found.step
        for name in _STATE:
            setattr(self, name, found.state[name])
        weights = checkpoint.part(found, "best" if self.best[1] != self.step else "model")
        self.best, self.best_weights = tuple(self.best), weights
        told = folder / "history.jsonl"
        if told.exists():
            rows = records.read_history(told)
            self.told = {row["step"]: row for row in rows if row["step"] > self.step}
        if found.state["made_by"] != self._made_by:
            print(
                f"the checkpoint was made {found.state['made_by']}, and this is"
                f" {self._made_by}: the weights will not be, bit for bit, those of one machine"
            )

    @property
    def _made_by(self) -> str:
        where = f"on {device.describe(self.device)} in {self.precision}"
        compiled = ", compiled" if self.take_step.compiled else ""
        return f"{where} with PyTorch {torch.__version__}{compiled}"

    def metrics(self) -> dict[str, float]:
        rows = [row for row in self.history if "val_loss" in row]
        return {
            "best_val_loss": self.best[0],
            "best_step": self.best[1],
            "last_val_loss": rows[-1]["val_loss"],
            "last_train_loss": rows[-1]["train_loss"],
            "steps": self.step,
            "epochs": self.step * self.tokens_a_step / len(self.data.train),
            "median_tokens_per_second": median(
                [r["tokens_per_second"] for r in self.history if "tokens_per_second" in r] or [0.0]
            ),
            "parameters": self.model_size,
        } | ({"initial_val_loss": self.history[0]["val_loss"]} if self.start else {})

    def outcome(self) -> str:
        """What the training has made of the weights that it started from."""
        name, before, (best, step) = self.p.init_from, self.history[0]["val_loss"], self.best
        if step == 0:
            return (
                f"no evaluation was better than {before:.3f}, that of {name} before training:"
                " models/gpt2 is that model, untrained; try a lower train.learning_rate"
            )
        return f"held-out loss {before:.3f} before training, {best:.3f} at step {step:,}"

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
    if trainer.start:
        lines.append(f"from the weights of {pretrained.FOLDER / trainer.start.path.name}")
    if trainer.step:
        lines.append(f"going on from the checkpoint of step {trainer.step:,}")
    return "\n".join(lines)


def _record(trainer: Trainer, folder: Path, report: dict[str, int], root: Path) -> records.Record:
    """The run that this training is: the one that it was before it was stopped."""
    path, now = folder / records.FILE, records.now()
    known = records.read(path) if path.exists() else None
    size, key = trainer.model.params, folder.name
    settings = params.flatten(model=size, train=trainer.p) | _facts(trainer.data, root, report)
    record = records.Record(
        id=known.id if known else records.new_id(),
        started=known.started if known else now,
        name=tracking.run_name(f"{size.n_layer}x{size.n_head}x{size.n_embd}-{key[:6]}"),
        params={name: str(value) for name, value in settings.items()},
        tags=tracking.context("stages/train.py")
        | {"train_key": key, "data_digest": trainer.data.digest}
        | {"held_out_digest": trainer.data.meta["val_sha256"]}
        | {"precision": trainer.precision, "device": device.describe(trainer.device)}
        | ({"init_sha256": trainer.start.sha256} if trainer.start else {}),
    )
    records.write(record, path)  # before MLflow hears of it: a kill makes no second run
    return record


def _write_outs(trainer: Trainer, record: records.Record, root: Path) -> None:
    trainer.model.load_state_dict(trainer.best_weights)
    huggingface.save(trainer.model, root / "models/gpt2", trainer.vocabulary.row)
    out, history = root / records.TRAINING, trainer.history
    ids = {"folio_id": record.id, "train_key": record.tags["train_key"]}
    texts = {
        "history.csv": _as_csv(history, ["step", "train_loss", "learning_rate"]),
        "held_out.csv": _as_csv(history, ["step", "val_loss"]),
        "metrics.json": json.dumps(trainer.metrics(), indent=2) + "\n",
        "run.json": json.dumps(ids, indent=2) + "\n",
    }
    for name, text in texts.items():
        files.write_text(out / name, text)
    records.write_history(history, out / "history.jsonl")
    pictures.loss_curve(history, out / "loss.png")
    weights = files.sha256(root / "models/gpt2/model.safetensors")
    tags = record.tags | {"weights_sha256": weights}
    records.write(replace(record, ended=history[-1]["time"], tags=tags), out / records.FILE)


def _as_csv(history: list[dict[str, Any]], columns: list[str]) -> str:
    """The rows that have all the columns, for DVC's plots: they read no JSON lines, and draw an
    empty cell as 0."""
    rows = [[row[column] for column in columns] for row in history if set(columns) <= row.keys()]
    return "".join(",".join(map(str, row)) + "\n" for row in [columns, *rows])


if __name__ == "__main__":
    with one_line_errors():
        main()
