"""The files written by training: the record at its start, models/gpt2 and models/training at its
end."""

import json
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

from folio import files, params
from folio.errors import UserError
from folio.gpt import huggingface
from folio.gpt.model import GPT, parameter_counts
from folio.run import (
    HISTORY,
    RECORD,
    TRAINING,
    Record,
    new_id,
    now_ms,
    read_record,
    run_name,
    write_history,
    write_record,
)
from folio.tokens.vocabulary import Vocabulary
from folio.training.trainer import Trainer


def start_record(trainer: Trainer, folder: Path, root: Path, tags: dict[str, str]) -> Record:
    """Write the record of this training run to its folder, and return it. A resumed run keeps its
    id.

    tags: additional tags, such as the git commit.
    """
    path = folder / RECORD
    known = read_record(path) if path.exists() else None
    size, key = trainer.model.params, folder.name
    settings = params.flatten(model=size, train=trainer.params) | _facts(trainer, root)
    record = Record(
        id=known.id if known else new_id(),
        started=known.started if known else now_ms(),
        name=run_name(f"{size.n_layer}x{size.n_head}x{size.n_embd}-{key[:6]}"),
        params={name: str(value) for name, value in settings.items()},
        tags=tags
        | {"train_key": key, "data_digest": trainer.data.digest}
        | {"held_out_digest": trainer.data.meta["val_sha256"]}
        | {"precision": trainer.precision, "device": trainer.machine}
        | ({"init_sha256": trainer.pretrained.sha256} if trainer.pretrained else {})
        | ({"teachers_sha256": trainer.teachers.sha256} if trainer.teachers else {}),
    )
    write_record(record, path)  # before MLflow gets it, so that a killed run resumes the same one
    return record


def write(trainer: Trainer, record: Record | None, root: Path) -> None:
    """Write the weights that train.keep selects to root/models/gpt2, and everything else to
    root/models/training.

    Collective; the main process writes, and the others have no record.
    """
    kept = trainer.weights.full(trainer.kept_weights)
    if not record:
        for _ in kept:
            pass  # takes part in gathering each tensor
        return
    huggingface.save(trainer.model, root / "models/gpt2", trainer.vocabulary.row, weights=kept)
    out, rows = root / TRAINING, trainer.history.rows
    ids = {"folio_id": record.id, "train_key": record.tags["train_key"]}
    texts = {
        "history.csv": _csv(rows, ["step", "train_loss", "learning_rate"]),
        "val_loss.csv": _csv(rows, ["step", "val_loss"]),
        "metrics.json": json.dumps(metrics(trainer), indent=2) + "\n",
        "run.json": json.dumps(ids, indent=2) + "\n",
    }
    for name, text in texts.items():
        files.write_text(out / name, text)
    write_history(rows, out / HISTORY)
    weights = huggingface.weights_sha256(root / "models/gpt2")
    tags = record.tags | {"weights_sha256": weights}
    write_record(replace(record, ended=rows[-1]["time"], tags=tags), out / RECORD)


def metrics(trainer: Trainer) -> dict[str, float]:
    """The summary metrics of the training run. kept_...: of the weights in models/gpt2."""
    rows, best = trainer.history.rows, trainer.early_stopping
    evaluations = [row for row in rows if "val_loss" in row]
    speeds = [row["tokens_per_second"] for row in rows if "tokens_per_second" in row]
    tokens = trainer.steps_done * trainer.tokens_per_step
    last_loss = evaluations[-1]["val_loss"]
    return {
        "kept_val_loss": best.best_loss if best.keep_weights else last_loss,
        "kept_step": best.best_step if best.keep_weights else trainer.steps_done,
        "best_val_loss": best.best_loss,
        "best_step": best.best_step,
        "last_val_loss": last_loss,
        "last_train_loss": evaluations[-1]["train_loss"],
        "steps": trainer.steps_done,
        "epochs": tokens / trainer.tokens_per_epoch,
        "median_tokens_per_second": median(speeds or [0.0]),
        "parameters": parameters_written(trainer.model, trainer.vocabulary),
    } | ({"initial_val_loss": rows[0]["val_loss"]} if trainer.pretrained else {})


def parameters_written(model: GPT, vocabulary: Vocabulary) -> int:
    """The number of parameters in models/gpt2, where each token has its own embedding row."""
    trained = sum(p.numel() for p in model.parameters())
    return trained + (len(vocabulary.row) - vocabulary.rows) * model.params.n_embd


def _facts(trainer: Trainer, root: Path) -> dict[str, Any]:
    """The corpus statistics and the parameter counts, to be logged as params of the run."""
    file, meta = root / "data/diagnostics.json", trainer.data.meta
    found = {"corpus": meta["corpus"], "sha256": meta["text_sha256"]}
    found |= _read_statistics(file) if file.exists() else {}
    if trainer.data.segmented:
        found |= {"segmentations": len(trainer.data.segmented), "bpe_dropout": meta["bpe_dropout"]}
    counts = parameter_counts(trainer.model)
    return {f"data.{key}": value for key, value in found.items()} | {
        f"parameters.{part}": count for part, count in counts.items()
    }


def _read_statistics(path: Path) -> dict[str, Any]:
    try:
        statistics = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(statistics, dict):
            raise ValueError
        return statistics
    except (ValueError, RecursionError):
        raise UserError(f"{path} is damaged: `dvc repro --force prepare` recreates it") from None


def _csv(rows: list[dict[str, Any]], columns: list[str]) -> str:
    """The rows that have all these columns, as CSV for DVC's plots, which do not support JSON lines
    and would draw an empty cell as 0."""
    cells = [[row[column] for column in columns] for row in rows if set(columns) <= row.keys()]
    return "".join(",".join(map(str, row)) + "\n" for row in [columns, *cells])
