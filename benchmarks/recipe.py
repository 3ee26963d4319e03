"""Finds the settings with the lowest validation loss: trains variants of params.yaml in parallel.

Reads one variant per line from stdin, as a JSON object, and prints a table, best first:

    echo '{"train.learning_rate": 1e-3}' | python -m benchmarks.recipe --jobs 1

Requires data/prepared (`dvc repro prepare`). Nothing is logged to MLflow and no model is saved.
"""

import argparse
import json
import multiprocessing
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import yaml

from folio import device, params
from folio.errors import one_line_errors
from folio.gpt.model import ModelParams
from folio.run import Record
from folio.runtime import RuntimeParams
from folio.tokens import token_files
from folio.tracking.logger import RunLogger
from folio.training import pretrained
from folio.training.params import TrainParams
from folio.training.trainer import Trainer
from stages import train as train_stage


class NoLogger(RunLogger):
    """A logger that logs nothing."""

    def __init__(self) -> None:
        super().__init__(None, Record(id="", name="", started=0, params={}, tags={}))

    def send(self, history: list[dict[str, Any]]) -> None:
        pass


def build(variant: dict[str, Any]) -> tuple[Trainer, RuntimeParams]:
    """A trainer for params.yaml with settings such as {"train.steps": 50} applied to it."""
    tree = yaml.safe_load(params.FILE.read_text())
    for name, value in variant.items():
        section, key = name.split(".")
        tree[section][key] = value
    tree["runtime"] |= {"progress": False, "checkpoint_seconds": 1e9}
    with tempfile.NamedTemporaryFile("w", suffix=".yaml") as file:
        yaml.safe_dump(tree, file)
        model, train, runtime = params.load(
            file.name, model=ModelParams, train=TrainParams, runtime=RuntimeParams
        )
    where = device.resolve_device(runtime.device)
    precision = device.resolve_precision(train.precision, where)
    data = token_files.read(Path("data/prepared"))
    initial = pretrained.find(train.init_from, Path.cwd())
    return Trainer(model, train, data, where, precision, initial), runtime


def measure(variant: dict[str, Any]) -> tuple[float, int, float, float]:
    """Train a variant. Returns its best validation loss, the step of that evaluation, the last
    training loss and the training time in seconds."""
    trainer, runtime = build(variant)
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        train_stage.train(trainer, runtime, Path(folder), NoLogger())
    seconds = time.perf_counter() - started
    best = trainer.early_stopping
    return best.best_loss, best.best_step, trainer.history.rows[-1]["train_loss"], seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--jobs", type=int, default=1, help="variants to train at once")
    jobs = parser.parse_args().jobs
    variants = [json.loads(line) for line in sys.stdin if line.strip()]
    with multiprocessing.get_context("spawn").Pool(jobs, maxtasksperchild=1) as pool:
        results = pool.map(measure, variants, chunksize=1)
    print("validation   at step   training   seconds   variant")
    for (loss, step, train_loss, seconds), variant in sorted(
        zip(results, variants, strict=True), key=lambda pair: pair[0]
    ):
        shown = " ".join(f"{key.split('.')[1]}={value}" for key, value in variant.items())
        print(f"{loss:10.4f} {step:9,} {train_loss:10.3f} {seconds:9.1f}   {shown}")


if __name__ == "__main__":
    with one_line_errors():
        main()
