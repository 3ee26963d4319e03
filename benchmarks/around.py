"""Time spent outside training steps: startup, shutdown, evaluations, MLflow, and a `dvc repro`
with nothing to do.

    python -m benchmarks.around

Runs the pipeline of params.yaml, or of --variant, with fewer steps in a temporary project. Then
trains with and without MLflow, which requires data/prepared (`dvc repro prepare`).
"""

import argparse
import itertools
import os
import shutil
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from statistics import median

from benchmarks import project
from benchmarks.project import Command
from benchmarks.recipe import build
from folio import device
from folio.errors import one_line_errors
from folio.run import Record
from folio.sweeps import variants
from folio.tracking.logger import NoLogger, RunLogger
from stages import train as train_stage


class TimedLogger(RunLogger):
    """A logger that measures the CPU time of its thread."""

    seconds = 0.0

    def _work(self) -> None:
        super()._work()
        self.seconds = time.thread_time()


def measure_command(folder: Path, *words: str) -> float:
    """The time that a command takes, in seconds."""
    started = time.monotonic()
    Command(folder, *words).finish()
    return time.monotonic() - started


def measure_train_stage(folder: Path) -> tuple[float, float, float, float]:
    """Run the train stage without an MLflow store. Returns four times in seconds: from the start of
    the process to the first step, for one step, for the evaluation after the last step, and from
    there to the end of the process."""
    for leftover in (".checkpoints", "models", "mlruns"):
        shutil.rmtree(folder / leftover, ignore_errors=True)
    (folder / "mlflow.db").unlink(missing_ok=True)
    started = time.time()
    Command(folder, "stages.train").finish()
    ended = time.time()
    times = [row["time"] / 1000 for row in project.read_history(folder)]  # one row per step
    step = median(b - a for a, b in itertools.pairwise(times))
    return times[0] - step - started, step, times[-1] - times[-2] - step, ended - times[-1]


def measure_training(variant: dict, number: int | None) -> tuple[float, float]:
    """Train in this process. Returns the training time and MLflow's CPU time in seconds.

    number: identifies the run in MLflow; None trains without MLflow and without system metrics.
    """
    trainer, runtime = build(variant)
    record = Record(id=f"{number or 0:032x}", name="around", started=1, params={}, tags={})
    with tempfile.TemporaryDirectory() as folder:
        if number is None:
            runtime = replace(runtime, system_metrics=False)
            started = time.perf_counter()
            train_stage.train(trainer, runtime, Path(folder), NoLogger())
            return time.perf_counter() - started, 0.0
        with TimedLogger(None, record) as logger:
            started = time.perf_counter()
            train_stage.train(trainer, runtime, Path(folder), logger)
            seconds = time.perf_counter() - started
        return seconds, logger.seconds


def measure_pipeline(variant: str | None, rounds: int) -> tuple[float, float]:
    """Print the times of whole commands. Returns those of a step and an evaluation in seconds."""
    steps = 60
    with tempfile.TemporaryDirectory(prefix="around-", ignore_cleanup_errors=True) as temporary:
        folder = Path(temporary) / "base"
        settings = {"steps": steps, "eval_interval": steps, "warmup_steps": 1}
        overlay = {"train": settings, "runtime": {"log_interval": 1}}
        project.write_project(folder, variant, overlay)
        project.repro(folder).finish()
        nothing = [measure_command(folder, "dvc", "repro") for _ in range(rounds)]
        trainings = [measure_train_stage(folder) for _ in range(rounds)]
        start, step, evaluation, end = map(median, zip(*trainings, strict=True))
        print(project.headline(folder), f"medians of {rounds}", sep="; ")
    print(f"dvc repro with nothing to do           {median(nothing):8.2f} s")
    print(f"process start to first step            {start:8.2f} s")
    print(f"last step to exit                      {evaluation + end:8.2f} s", end="")
    print(f", including {evaluation:.2f} s for the last evaluation")
    return step, evaluation


def measure_mlflow(variant: dict, rounds: int, steps: int) -> None:
    """Print the cost of MLflow as a share of the training time."""
    variant = variant | {"train.steps": steps, "train.warmup_steps": 1}
    with tempfile.TemporaryDirectory(prefix="around-") as temporary:
        os.environ["DVC_ROOT"] = temporary
        device.tune_malloc()
        measure_training(variant | {"train.steps": 2}, 1)  # creates the store
        times: dict[bool, list[tuple[float, float]]] = {True: [], False: []}
        for n in range(rounds):
            for with_mlflow in (True, False) if n % 2 else (False, True):  # take turns going first
                times[with_mlflow].append(measure_training(variant, n + 2 if with_mlflow else None))
    seconds, plain = (median(t[0] for t in times[kind]) for kind in (True, False))
    share = median(thread / training for training, thread in times[True])
    print(f"{f'{steps} steps, time added by MLflow':<38}{seconds / plain - 1:+9.1%}")
    print(f"MLflow's thread, share of the run time{share:9.1%}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--variant", help="one of the files in variants/, without .yaml")
    parser.add_argument("--steps", type=int, default=500, help="training steps with MLflow")
    options = parser.parse_args()
    step, evaluation = measure_pipeline(options.variant, options.rounds)
    variant = variants.read(options.variant) if options.variant else {}
    interval = build(variant)[0].params.eval_interval
    print(f"an evaluation vs. the steps in between{evaluation / (interval * step):9.1%}")
    measure_mlflow(variant, options.rounds, options.steps)


if __name__ == "__main__":
    with one_line_errors():
        main()
