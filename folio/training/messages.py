"""The messages printed during training."""

from pathlib import Path
from typing import Any

from folio.gpt.model import parameter_counts
from folio.run import kept
from folio.tokens.token_files import TokenData
from folio.training.init_from import FOLDER
from folio.training.outputs import metrics, parameters_written
from folio.training.trainer import Trainer


def corpus(data: TokenData) -> str:
    """Printed first, because a large model takes minutes to create."""
    name = data.meta["corpus"]
    line = f"{name}: {len(data.train):,} training tokens, {len(data.val):,} validation tokens"
    return f"{line}\n{_segmentations(data)}" if data.segmented else line


def introduction(trainer: Trainer) -> str:
    """The machine and the model, or the step to resume from, printed before the first step."""
    p = trainer.params
    head = ", the head in fp8" if p.fp8_head else ""
    lines = [
        f"on {trainer.machine} in {trainer.precision}{head};"
        f" {trainer.tokens_per_step:,} tokens per step,"
        f" {'at most ' if p.patience else ''}{p.steps:,} steps",
    ]
    if trainer.pretrained:
        lines.append(f"starting from {FOLDER / trainer.pretrained.path.name}")
    if trainer.teachers:
        lines.append(_teachers(trainer.teachers.paths))
    if trainer.steps_done:
        lines.append(f"resuming from the checkpoint of step {trainer.steps_done:,}")
        return "\n".join(lines)
    counts = parameter_counts(trainer.model)
    width = max(map(len, counts))
    lines += ["parameters", *(f"  {part:<{width}} {count:>13,}" for part, count in counts.items())]
    if trainer.vocabulary.rows < len(trainer.vocabulary.row):
        written = parameters_written(trainer.model, trainer.vocabulary)
        lines.append(
            f"  ({trainer.vocabulary.rows:,} embedding rows are trained; with one for each of the"
            f" {len(trainer.vocabulary.row):,} tokens, models/gpt2 has {written:,} parameters)"
        )
    if count := p.overfit_batches:
        steps = "step" if count == 1 else f"{count:,} steps"
        lines.append(
            f"only on the windows of the first {steps}, over and over"
            f" ({trainer.tokens_per_epoch:,} tokens)"
        )
    return "\n".join(lines)


def _teachers(paths: list[Path]) -> str:
    names = ", ".join(path.name for path in paths[:8])
    more = f" and {len(paths) - 8} more" if len(paths) > 8 else ""
    count = "1 teacher" if len(paths) == 1 else f"{len(paths)} teachers"
    return f"{count} from {FOLDER / paths[0].parent.name}: {names}{more}"


def _segmentations(data: TokenData) -> str:
    return (
        f"and {len(data.segmented)} random segmentations of the training text"
        f" (BPE dropout {data.meta['bpe_dropout']:g})"
    )


def evaluation(trainer: Trainer, row: dict[str, Any]) -> str:
    """A one-line summary of an evaluation."""
    mark = "  best so far" if trainer.early_stopping.best_step == trainer.steps_done else ""
    train_loss = row.get("train_loss")
    training = f"training loss {train_loss:.3f}" if train_loss is not None else "before training   "
    return f"step {trainer.steps_done:>6,}  {training}  validation loss {row['val_loss']:.3f}{mark}"


def result(trainer: Trainer) -> str:
    """Which weights were kept, and their validation loss; of a fine-tuned model, also that before
    training."""
    found = metrics(trainer)
    loss, step = kept(found)
    text = f"models/gpt2 has the weights of step {step:,}: validation loss {loss:.3f}"
    if trainer.pretrained and step == 0:
        return (
            f"no evaluation was better than {loss:.3f}, the validation loss of"
            f" {trainer.params.init_from} before training, so models/gpt2 contains that model"
            " unchanged; try a lower train.learning_rate"
        )
    if trainer.pretrained:
        text += f", {trainer.history.rows[0]['val_loss']:.3f} before training"
    if step != found["best_step"]:
        text += f"; the best evaluation was {found['best_val_loss']:.3f} at step"
        text += f" {found['best_step']:,}"
    return text
