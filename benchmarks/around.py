"""What is around the steps: to start, to end, to evaluate, to track, to find nothing to do.

    python -m benchmarks.around

Runs the pipeline of params.yaml, or of --variant, with fewer steps in a project of its own.
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
from benchmarks.recipe import Untracked, build
from folio import device
from folio.run import Record
from folio.sweeps import variants
from folio.errors import one_line_errors
from folio.tracking.logger import RunLogger


class Timed(RunLogger):
    """Knows what its thread has computed."""

    seconds = 0.0

    def _work(self) -> None:
        super()._work()
        self.seconds = time.thread_time()


def command(folder: Path, *words: str) -> float:
    """Seconds of a whole command."""
    started = time.monotonic()
    Command(folder, *words).finish()
    return time.monotonic() - started


def train(folder: Path) -> tuple[float, float, float, float]:
    """Seconds from the process' start to its first step, of a step, of the evaluation after the
    last step, and from there to the process' end. There is no MLflow store yet."""
    for left in (".checkpoints", "models", "mlruns"):
        shutil.rmtree(folder / left, ignore_errors=True)
    (folder / "mlflow.db").unlink(missing_ok=True)
    started = time.time()
    Command(folder, "stages.train").finish()
    ended = time.time()
    times = [row["time"] / 1000 for row in project.read_history(folder)]  # a row a step
    step = median(b - a for a, b in itertools.pairwise(times))
    return times[0] - step - started, step, times[-1] - times[-2] - step, ended - times[-1]


def tracked(variant: dict, n: int | None) -> tuple[float, float]:
    """Seconds that a training takes in this process, and those that MLflow's thread computes.

    n: the how manieth run this is; None is a training without MLflow and the machine's load.
    """
    trainer, runtime = build(variant)
    record = Record(id=f"{n or 0:032x}", name="around", started=1, params={}, tags={})
    with tempfile.TemporaryDirectory() as folder:
        if n is None:
            started = time.perf_counter()
            trainer.train(Path(folder), replace(runtime, system_metrics=False), Untracked())
            return time.perf_counter() - started, 0.0
        with Timed(None, record) as follower:
            started = time.perf_counter()
            trainer.train(Path(folder), runtime, follower)
            seconds = time.perf_counter() - started
        return seconds, follower.seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--variant", help="one of the files in variants/, without .yaml")
    parser.add_argument("--steps", type=int, default=500, help="of a training that is tracked")
    options = parser.parse_args()
    rounds, steps = range(options.rounds), 60
    with tempfile.TemporaryDirectory(prefix="around-", ignore_cleanup_errors=True) as place:
        folder = Path(place) / "base"
        own = {"steps": steps, "eval_interval": steps, "warmup_steps": 1}
        overlay = {"train": own, "runtime": {"log_interval": 1}}
        project.write_project(folder, options.variant, overlay)
        project.repro(folder).finish()
        nothing = [command(folder, "dvc", "repro") for _ in rounds]
        turns = [train(folder) for _ in rounds]
        start, step, evaluation, end = map(median, zip(*turns, strict=True))
        print(project.headline(folder), f"medians of {options.rounds}", sep="; ")
    print(f"dvc repro with nothing to do           {median(nothing):8.2f} s")
    print(f"process start to first step            {start:8.2f} s")
    print(f"last step to exit                      {evaluation + end:8.2f} s", end="")
    print(f", of which {evaluation:.2f} s are the last evaluation")

    variant = variants.read(options.variant) if options.variant else {}
    variant |= {"train.steps": options.steps, "train.warmup_steps": 1}
    with tempfile.TemporaryDirectory(prefix="around-") as place:
        os.environ["DVC_ROOT"] = place
        device.tune_malloc()
        tracked(variant | {"train.steps": 2}, 1)  # makes the store
        turns: dict[bool, list[tuple[float, float]]] = {True: [], False: []}
        for n in rounds:
            for with_mlflow in (True, False) if n % 2 else (False, True):  # neither always first
                turns[with_mlflow].append(tracked(variant, n + 2 if with_mlflow else None))
    seconds, plain = (median(t[0] for t in turns[kind]) for kind in (True, False))
    share = median(computed / taken for taken, computed in turns[True])
    every = build(variant)[0].p.eval_interval
    print(f"an evaluation, of the steps between two{evaluation / (every * step):9.1%}")
    print(f"{options.steps} steps with MLflow, of those without  {seconds / plain - 1:+9.1%}")
    print(f"what MLflow's thread computes, of them {share:9.1%}")


if __name__ == "__main__":
    with one_line_errors():
        main()
