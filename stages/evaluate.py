"""The evaluate stage: metrics, samples and plots for models/gpt2."""

import hashlib
import json
from functools import partial
from pathlib import Path

from folio import device, files, gpus, inputs, params, plots, progress
from folio.errors import UserError, one_line_errors
from folio.gpt import huggingface
from folio.gpt.model import GPT
from folio.gpt.validation import token_losses
from folio.inference.evaluation import EvaluateParams, compute_metrics, format_report, samples_page
from folio.run import (
    EVALUATION,
    RECORD,
    UNFINISHED,
    Record,
    Run,
    lock_if_idle,
    now_ms,
    project_root,
    read_evaluation,
    read_record,
    read_training,
    remove_unfinished,
    write_record,
)
from folio.runtime import RuntimeParams
from folio.tokens import token_files
from folio.tokens.token_files import TokenData
from folio.tracking import context
from folio.tracking.store import Store, reconnect, warn_on_failure
from folio.tracking.writer import RunWriter


def main() -> None:
    evaluate, runtime = params.load(evaluate=EvaluateParams, runtime=RuntimeParams)
    inputs.check(strict=True)  # the sources have been imported
    gpus.reserve(project_root())
    run(evaluate, runtime, Path.cwd(), project_root())
    inputs.check()


def run(p: EvaluateParams, runtime: RuntimeParams, root: Path, project: Path) -> None:
    """Evaluate root/models/gpt2 on root/data/prepared and write root/models/evaluation.

    Logs the results to MLflow, then removes the checkpoints of the training run under `project`,
    which are no longer needed now that DVC has the model. Raises UserError if params, model and
    data do not match.
    """
    device.tune_malloc()
    model = huggingface.load(root / "models/gpt2", device.resolve_device(runtime.device))
    data = token_files.read(root / "data/prepared")
    _check_fit(p, model, data)
    trained = _read_training(root)
    training = trained.record
    track = progress.tracker(runtime.hide_progress)
    losses = token_losses(model, data.val, track=track, description="1 of 4: validation loss")
    metrics = compute_metrics(model, data, losses, p, track)
    out = root / EVALUATION
    files.write_text(out / "metrics.json", json.dumps(metrics, indent=2) + "\n")
    files.write_text(out / "samples.md", samples_page(model, p, track))
    plots.loss_curve(trained.history, out / "loss.png")
    plots.loss_by_position(losses, model.params.block_size, out / "loss_by_position.png")
    plots.loss_by_rarity(losses, data.val[1:], data.train_counts, out / "loss_by_rarity.png")
    write_record(_record(p, training, out), out / RECORD)
    inputs.check()  # before MLflow has the evaluation and the checkpoints are removed
    print(format_report(metrics))
    with warn_on_failure():
        writer = RunWriter(Store(runtime.tracking_uri))
        for each in (trained, read_evaluation(root)):
            reconnect(partial(writer.complete, each))
    _remove_checkpoints(project / UNFINISHED / training.tags["train_key"], training.id)


def _check_fit(p: EvaluateParams, model: GPT, data: TokenData) -> None:
    """Raise UserError if the model is too small for the params or the data."""
    if p.stride > model.params.block_size:
        raise UserError(
            f"evaluate.stride: {p.stride} is longer than the model's context:"
            f" set it to at most {model.params.block_size}"
        )
    if model.transformer.wte.num_embeddings < data.meta["vocabulary"]:
        raise UserError(
            "models/gpt2 has a smaller vocabulary than data/prepared: `dvc repro train` trains a"
            " model that fits"
        )


def _read_training(root: Path) -> Run:
    """The run in models/training. Raises UserError if models/gpt2 is from a different run."""
    trained = read_training(root)
    tags = trained.record.tags
    expected = tags.get("weights_sha256") if "train_key" in tags else None
    if huggingface.weights_sha256(root / "models/gpt2") != expected:
        raise UserError(
            "models/gpt2 is not the model that models/training describes: `dvc checkout` restores"
            " it, `dvc repro --force train` trains it again"
        )
    return trained


def _record(p: EvaluateParams, training: Record, out: Path) -> Record:
    """The record of an evaluation. Its id is a hash of params and results, so repeating the same
    evaluation updates the same MLflow run."""
    settings = {name: str(value) for name, value in params.flatten(evaluate=p).items()}
    results = [(out / name).read_text(encoding="utf-8") for name in ("metrics.json", "samples.md")]
    content = json.dumps([training.id, settings, *results])
    now = now_ms()
    return Record(
        id=hashlib.sha256(content.encode()).hexdigest()[:32],
        name="evaluate",
        started=now,
        ended=now,
        parent=training.id,
        params=settings,
        tags=context.tags("stages/evaluate.py") | {"train_key": training.tags["train_key"]},
    )


def _remove_checkpoints(folder: Path, training_id: str) -> None:
    """Remove the checkpoints in a folder, unless another run owns or is using it."""
    if folder.exists():
        with lock_if_idle(folder) as idle:
            record = folder / RECORD
            if idle and record.exists() and read_record(record).id == training_id:
                remove_unfinished(folder)


if __name__ == "__main__":
    with one_line_errors():
        main()
    inputs.exit_after_check()
