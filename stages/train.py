"""The train stage: trains on the token files and writes the weights to models/gpt2."""

import contextlib
from collections.abc import Iterator
from pathlib import Path

from tqdm import tqdm

from folio import device, distributed, gpus, inputs, launch, params, progress, signals
from folio.errors import UserError, one_line_errors
from folio.gpt.model import ModelParams
from folio.run import UNFINISHED, Record, lock_for_training, project_root, read_training
from folio.runtime import RuntimeParams
from folio.tokens import token_files
from folio.tracking import context
from folio.tracking.logger import NoLogger, RunLogger
from folio.tracking.system_metrics import SystemMetrics
from folio.training import messages, micro_batches, outputs, pretrained, teachers
from folio.training.key import train_key
from folio.training.params import TrainParams
from folio.training.step import NonFiniteError
from folio.training.timing import CheckpointPacing, Throughput
from folio.training.trainer import Trainer


def main() -> None:
    model, train, runtime = params.load(model=ModelParams, train=TrainParams, runtime=RuntimeParams)
    inputs.check(strict=True)  # the sources have been imported
    gpus.reserve(project_root())
    kind = device.resolve_device(runtime.device).type
    most = micro_batches.useful_processes(train, model.block_size)
    if (count := launch.count_processes(runtime.processes, kind, most)) > 1:
        unfinished = project_root() / UNFINISHED
        launch.run(
            *("stages.train", count, kind),
            progress=lambda: sorted(unfinished.glob("*/step-*")),
            largest_number=lambda most: micro_batches.largest_number(train, most),
        )
    else:
        run(model, train, runtime, Path.cwd(), project_root())
    inputs.check()


def run(
    model_params: ModelParams,
    train_params: TrainParams,
    runtime: RuntimeParams,
    root: Path,
    project: Path,
) -> None:
    """Train on root/data/prepared and write root/models, together with the other processes, if any.

    project: the folder that contains the checkpoints and the MLflow store.
    """
    device.tune_malloc()
    group = distributed.join(device.resolve_device(runtime.device).type)
    with group.agreeing():
        where = group.device(device.resolve_device(runtime.device))
        precision = device.resolve_precision(train_params.precision, where)
        data = token_files.read(root / "data/prepared")
        token_files.check_length(data.train, "training", model_params.block_size)
        token_files.check_length(data.val, "validation", model_params.block_size)
        initial = pretrained.find(train_params.init_from, root)
        found = teachers.find(train_params.distill_from, root)
        key = train_key(model_params, train_params, data.digest, initial, found)
    folder = project / UNFINISHED / key
    with group.main_holds(lock_for_training(folder)):
        with group.agreeing():
            if group.is_main:
                print(messages.corpus(data), flush=True)
            trainer = Trainer(
                *(model_params, train_params, data, where, precision, initial, group, found)
            )
        trainer.resume(folder)
        with start_run(trainer, runtime, folder, root) as (record, logger):
            train(trainer, runtime, folder, logger)
            with group.agreeing():
                inputs.check()  # before MLflow has a finished run; the checkpoint is kept
                outputs.write(trainer, record, root)
            if group.is_main:
                print(messages.result(trainer))
                logger.finish(read_training(root))


@contextlib.contextmanager
def start_run(
    trainer: Trainer, runtime: RuntimeParams, folder: Path, root: Path
) -> Iterator[tuple[Record | None, RunLogger | NoLogger]]:
    """Start or resume the run of this training: its record, and its run in MLflow. Only the main
    process has them."""
    if not trainer.group.is_main:
        yield None, NoLogger()
        return
    print(messages.introduction(trainer))
    record = outputs.start_record(trainer, folder, root, context.tags("stages/train.py"))
    with RunLogger(runtime.tracking_uri, record) as logger:
        yield record, logger


def train(
    trainer: Trainer, runtime: RuntimeParams, folder: Path, logger: RunLogger | NoLogger
) -> None:
    """Train until trainer.finished, with checkpoints in `folder`.

    On SIGTERM or Ctrl-C, or if dvc exits, saves a checkpoint and raises Stopped.
    """
    group = trainer.group
    system_metrics = SystemMetrics() if runtime.system_metrics else None
    pacing = CheckpointPacing(runtime.checkpoint_seconds)
    try:
        with progress_bar(trainer, runtime) as bar, signals.deferred():
            if trainer.pretrained and not trainer.history.rows:
                logger.start()
                trainer.log(validate(trainer, bar, {}))  # step 0: the loss before training
            throughput = Throughput(trainer.tokens_per_step, trainer.steps_done)
            while not trainer.finished:
                group.check_stop()
                if not trainer.row_is_due(runtime.log_interval):  # else resumed in an evaluation
                    step = trainer.steps_done
                    trainer.step(trainer.batches(step), trainer.learning_rate(step))
                    bar.update()
                    logger.start()  # not before the first step, which it would slow down
                if not trainer.row_is_due(runtime.log_interval):
                    continue
                metrics = trainer.read()  # the one point where the host waits for the device
                metrics |= throughput.read(trainer.steps_done)
                show_speed(bar, metrics)
                if evaluated := trainer.evaluation_is_due:
                    metrics = validate(trainer, bar, metrics)
                trainer.log(metrics | (system_metrics.read() if system_metrics else {}))
                if group.from_main(pacing.is_due(evaluated)) or trainer.finished:
                    with pacing.measured():
                        trainer.save(folder)
                        logger.send(trainer.history.rows)
                throughput.restart(trainer.steps_done)
    except NonFiniteError as problem:
        trainer.save(folder)
        group.silence_others()
        step = trainer.steps_done + 1
        raise UserError(f"step {step}: {problem}; {trainer.stability_hint}") from None
    except signals.Stopped:
        trainer.save_last_finite(folder)
        logger.send(trainer.history.rows)
        group.leave()
        raise signals.Stopped(
            f"step {trainer.steps_done:,} is saved; run the same command again to resume from it"
        ) from None


def validate(trainer: Trainer, bar: tqdm, metrics: dict[str, float]) -> dict[str, float]:
    """Add the validation loss to the metrics and return them. Updates early stopping."""
    track = trainer.group.stoppable(progress.tracker(bar.disable))
    metrics = metrics | {"val_loss": trainer.validate(track)}  # if stopped, nothing has changed
    trainer.early_stopping.update(metrics["val_loss"], trainer.steps_done, trainer.weights.state())
    if trainer.group.is_main:
        bar.write(messages.evaluation(trainer, metrics))
    return metrics


def progress_bar(trainer: Trainer, runtime: RuntimeParams) -> tqdm:
    total, done = trainer.params.steps, trainer.steps_done
    hide = runtime.hide_progress if trainer.group.is_main else True
    return tqdm(total=total, initial=done, unit="step", smoothing=0.05, disable=hide)


def show_speed(bar: tqdm, metrics: dict[str, float]) -> None:
    if "tokens_per_second" in metrics:
        speed = metrics["tokens_per_second"]
        bar.set_postfix_str(f"loss {metrics['train_loss']:.3f}, {speed:,.0f} tokens/s")


if __name__ == "__main__":
    with one_line_errors():
        main()
    inputs.exit_after_check()
