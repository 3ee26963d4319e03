"""Which recipe gives the lowest held-out loss: trains variants of params.yaml side by side.

Reads one JSON object a line from stdin, each a variant, and prints a table, best first:

    echo '{"train.learning_rate": 1e-3}' | python -m benchmarks.recipe --jobs 1

Needs data/prepared (`dvc repro prepare`). Nothing is tracked and no model is kept.
"""

import argparse
import json
import multiprocessing
import sys
import tempfile
import time
from pathlib import Path

import yaml

from folio import device, params
from folio.tokens import token_files
from folio.training import pretrained
from folio.gpt.model import ModelParams
from folio.runtime import RuntimeParams
from stages.train import Trainer, TrainParams


class Untracked:
    """Stands where training expects a follower of its history."""

    def follow(self, history: list) -> None:
        pass


def build(variant: dict) -> tuple[Trainer, RuntimeParams]:
    """A trainer for params.yaml with {"train.steps": 50, ...} laid over it."""
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
    data, start = (
        token_files.read(Path("data/prepared")),
        pretrained.find(train.init_from, Path.cwd()),
    )
    return Trainer(model, train, data, where, precision, start), runtime


def measure(variant: dict) -> tuple[float, int, float, float]:
    """Train a variant; its best held-out loss, at which step, its last training loss, seconds."""
    trainer, runtime = build(variant)
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        trainer.train(Path(folder), runtime, Untracked())
    seconds = time.perf_counter() - started
    return *trainer.best, trainer.history[-1]["train_loss"], seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--jobs", type=int, default=1, help="variants trained at once")
    jobs = parser.parse_args().jobs
    variants = [json.loads(line) for line in sys.stdin if line.strip()]
    with multiprocessing.get_context("spawn").Pool(jobs, maxtasksperchild=1) as pool:
        results = pool.map(measure, variants, chunksize=1)
    print("held-out   at step   training   seconds   variant")
    for (loss, step, train_loss, seconds), variant in sorted(
        zip(results, variants, strict=True), key=lambda pair: pair[0]
    ):
        shown = " ".join(f"{key.split('.')[1]}={value}" for key, value in variant.items())
        print(f"{loss:8.4f} {step:9,} {train_loss:10.3f} {seconds:9.1f}   {shown}")


if __name__ == "__main__":
    main()
