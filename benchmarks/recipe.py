"""Finds the settings with the lowest validation loss: trains variants of params.yaml in parallel.

Reads one variant per line from stdin, as a JSON object, and prints a row for each as it ends, then
all of them, best first:

    echo '{"train.learning_rate": 1e-3}' | python -m benchmarks.recipe --jobs 1
    python -m benchmarks.recipe --variant best-30m --corpus tinyshakespeare-development < lines

Nothing is logged to MLflow and no model is saved. The text is data/prepared (`dvc repro prepare`),
unless there is a named corpus: then it is prepared as params.yaml and the variant require. The last
validation loss is that of the last step; one with a sliding window would be lower.
"""

import argparse
import contextlib
import io
import json
import multiprocessing
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import yaml

from folio import device, params
from folio.corpus.params import PrepareParams
from folio.errors import one_line_errors
from folio.gpt.model import ModelParams
from folio.runtime import RuntimeParams
from folio.sweeps import variants
from folio.tokens import token_files
from folio.tracking.logger import NoLogger
from folio.training import pretrained
from folio.training.params import TrainParams
from folio.training.trainer import Trainer
from stages import prepare
from stages import train as train_stage

Settings = dict[str, Any]
PREPARED = Path("data/prepared")
HEAD = "validation: last      best   at step   training   seconds   variant"


def apply(settings: Settings) -> dict[str, dict[str, Any]]:
    """params.yaml with settings such as {"train.steps": 50} applied to it."""
    tree = yaml.safe_load(params.FILE.read_text())
    for name, value in settings.items():
        section, key = name.split(".")
        tree[section][key] = value
    tree["runtime"] |= {"progress": False, "checkpoint_seconds": 1e9, "system_metrics": False}
    return tree


def prepare_corpus(settings: Settings, root: Path) -> Path:
    """Prepare the corpus in `root`, unless it has been. Returns the folder with the tokens."""
    [p] = params.check(apply(settings), "settings", prepare=PrepareParams)
    folder = root / f"{p.corpus}-{p.training_fraction}-{p.segmentations}-{p.bpe_dropout}"
    if not folder.exists():
        (folder / "data").mkdir(parents=True)
        with contextlib.redirect_stdout(io.StringIO()):
            prepare.run(p, folder, folder, hide_progress=True)
    return folder / PREPARED


def build(settings: Settings, tokens: Path = PREPARED) -> tuple[Trainer, RuntimeParams]:
    model, train, runtime = params.check(
        apply(settings), "settings", model=ModelParams, train=TrainParams, runtime=RuntimeParams
    )
    where = device.resolve_device(runtime.device)
    precision = device.resolve_precision(train.precision, where)
    initial = pretrained.find(train.init_from, Path.cwd())
    return Trainer(model, train, token_files.read(tokens), where, precision, initial), runtime


def measure(settings: Settings, shown: str, tokens: Path) -> tuple[float, str]:
    """Train with the settings. Returns the last validation loss, and a row."""
    trainer, runtime = build(settings, tokens)
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        train_stage.train(trainer, runtime, Path(folder), NoLogger())
    seconds = time.perf_counter() - started
    best, last = trainer.early_stopping, trainer.history.rows[-1]
    row = f"{last['val_loss']:16.4f} {best.best_loss:9.4f} {best.best_step:9,}"
    row += f" {last['train_loss']:10.3f} {seconds:9.1f}   {shown}"
    print(row, flush=True)
    return last["val_loss"], row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--jobs", type=int, default=1, help="variants to train at once")
    parser.add_argument("--variant", help="one of variants/, to which the lines are applied")
    parser.add_argument("--corpus", help="prepare this named corpus; default: data/prepared")
    options = parser.parse_args()
    base = variants.read(options.variant) if options.variant else {}
    lines = [json.loads(line) for line in sys.stdin if line.strip()]
    with tempfile.TemporaryDirectory() as root:
        tasks = []
        for line in lines:
            settings, tokens = base | line, PREPARED
            if options.corpus:
                settings["prepare.corpus"] = options.corpus
                tokens = prepare_corpus(settings, Path(root))
            shown = " ".join(f"{key.split('.')[1]}={value}" for key, value in line.items())
            tasks.append((settings, shown, tokens))
        print(HEAD, flush=True)
        with multiprocessing.get_context("spawn").Pool(options.jobs, maxtasksperchild=1) as pool:
            results = pool.starmap(measure, tasks, chunksize=1)
    if len(results) > 1:
        print(HEAD.replace("validation", "best first"))
        print(*(row for _, row in sorted(results)), sep="\n")


if __name__ == "__main__":
    with one_line_errors():
        main()
