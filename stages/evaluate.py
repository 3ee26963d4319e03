"""Evaluate: what models/gpt2 has learned, as metrics, samples and plots."""

import hashlib
import json
from pathlib import Path

from folio import device, files, params, plots
from folio.errors import UserError, one_line_errors
from folio.gpt import huggingface
from folio.gpt.validation import token_losses
from folio.inference.evaluation import EvaluateParams, compute_metrics, format_report, samples_page
from folio.run import (
    EVALUATION,
    HISTORY,
    RECORD,
    TRAINING,
    UNFINISHED,
    Record,
    lock_if_idle,
    now_ms,
    project_root,
    read_evaluation,
    read_history,
    read_record,
    read_training,
    remove_unfinished,
    write_record,
)
from folio.runtime import RuntimeParams
from folio.tokens import token_files
from folio.tracking import context
from folio.tracking.store import Store, warn_on_failure
from folio.tracking.writer import RunWriter


def main() -> None:
    evaluate, runtime = params.load(evaluate=EvaluateParams, runtime=RuntimeParams)
    run(evaluate, runtime, Path.cwd(), project_root())


def run(p: EvaluateParams, runtime: RuntimeParams, root: Path, project: Path) -> None:
    """Read root/models and root/data/prepared, write root/models/evaluation, send it to MLflow."""
    device.tune_malloc()
    model = huggingface.load(root / "models/gpt2", device.resolve_device(runtime.device))
    data = token_files.read(root / "data/prepared")
    if p.stride > model.params.block_size:
        raise UserError(
            f"evaluate.stride: {p.stride} is longer than the model's context:"
            f" set at most {model.params.block_size}"
        )
    if model.transformer.wte.num_embeddings < data.meta["vocabulary"]:
        raise UserError(
            "models/gpt2 has a smaller vocabulary than data/prepared: `dvc repro train` makes one"
            " that fits"
        )
    trained = read_record(root / TRAINING / RECORD)
    if files.sha256(root / "models/gpt2/model.safetensors") != trained.tags.get("weights_sha256"):
        raise UserError(
            "models/gpt2 is not the model that models/training describes: `dvc checkout` restores"
            " it, `dvc repro --force train` trains it again"
        )
    losses = token_losses(model, data.val)
    metrics = compute_metrics(model, data, losses, p.stride)
    out = root / EVALUATION
    files.write_text(out / "metrics.json", json.dumps(metrics, indent=2) + "\n")
    files.write_text(out / "samples.md", samples_page(model, p))
    plots.loss_curve(read_history(root / TRAINING / HISTORY), out / "loss.png")
    plots.loss_by_position(losses, model.params.block_size, out / "loss_by_position.png")
    plots.loss_by_rarity(losses, data.val[1:], data.train, out / "loss_by_rarity.png")
    write_record(_record(p, trained, out), out / RECORD)
    print(format_report(metrics))
    with warn_on_failure():
        writer = RunWriter(Store(runtime.tracking_uri))
        writer.complete(read_training(root))
        writer.complete(read_evaluation(root))
    _remove_checkpoints(project / UNFINISHED / trained.tags["train_key"], trained.id)


def _record(p: EvaluateParams, trained: Record, out: Path) -> Record:
    """The evaluation's record. Its id is a hash of params and results, so that repeating an
    evaluation gives the same run in MLflow."""
    settings = {name: str(value) for name, value in params.flatten(evaluate=p).items()}
    results = [(out / name).read_text(encoding="utf-8") for name in ("metrics.json", "samples.md")]
    content = json.dumps([trained.id, settings, *results])
    now = now_ms()
    return Record(
        id=hashlib.sha256(content.encode()).hexdigest()[:32],
        name="evaluate",
        started=now,
        ended=now,
        parent=trained.id,
        params=settings,
        tags=context.tags("stages/evaluate.py") | {"train_key": trained.tags["train_key"]},
    )


def _remove_checkpoints(folder: Path, id: str) -> None:
    """Remove the training's checkpoints: DVC has the model that came of them."""
    if folder.exists():
        with lock_if_idle(folder) as idle:
            record = folder / RECORD
            if idle and record.exists() and read_record(record).id == id:
                remove_unfinished(folder)


if __name__ == "__main__":
    with one_line_errors():
        main()
