"""Finds the settings with the lowest validation loss: trains variants of params.yaml in parallel.

Reads one variant per line from stdin, as a JSON object, and prints a row for each as it ends, then
all of them, best first:

    echo '{"train.learning_rate": 1e-3}' | python -m benchmarks.recipe --jobs 1
    python -m benchmarks.recipe --variant best-30m --corpus tinyshakespeare-development < lines

Nothing is logged to MLflow and no model is saved. The text is prepared in a temporary folder, as
params.yaml, the variant, the line and --corpus require. The last validation loss is that of the
last step; one with a sliding window would be lower.
"""

import argparse
import contextlib
import hashlib
import io
import json
import multiprocessing
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, TypeVar

from folio import device, gpus, params, sections
from folio.corpus import corpus
from folio.corpus.params import PrepareParams
from folio.errors import UserError, one_line_errors
from folio.gpt.model import ModelParams
from folio.runtime import RuntimeParams
from folio.sweeps import sweep, variants
from folio.tokens import token_files
from folio.tracking.logger import NoLogger
from folio.training import init_from, pretrained, teachers
from folio.training.params import TrainParams
from folio.training.trainer import Trainer
from stages import prepare
from stages import train as train_stage

T = TypeVar("T")
Settings = dict[str, Any]
MakeTrainer = Callable[..., Trainer]
PREPARED = Path("data/prepared")
HEAD = "validation: last      best   at step   training   seconds   variant"


def apply(settings: Settings) -> dict[str, dict[str, Any]]:
    """params.yaml with settings such as {"train.steps": 50} applied to it, valid or not."""
    tree = params.read(params.FILE)
    for name, value in settings.items():
        section, _, key = name.partition(".")
        if isinstance(tree.setdefault(section, {}), dict):
            tree[section][key] = value
    tree["runtime"] |= {"progress": False, "checkpoint_seconds": 1e9, "system_metrics": False}
    return tree


def read_lines(lines: Iterable[bytes], base: Settings) -> list[Settings]:
    """The settings in each line. base: those that they are applied to.

    Raises UserError, which names the line, if it is not a JSON object, or if a setting is invalid.
    """
    found = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            settings = json.loads(line)
        except (ValueError, RecursionError):
            settings = None
        if not isinstance(settings, dict):
            raise UserError(f'line {number} is not a JSON object such as {{"train.steps": 50}}')
        with _naming(number):
            check(base | settings)
        found.append(settings)
    if not found:
        raise UserError('there is no line on stdin: write settings such as {"train.steps": 50}')
    return found


@contextlib.contextmanager
def _naming(number: int) -> Iterator[None]:
    """Name the line in a UserError of the block."""
    try:
        yield
    except UserError as error:
        raise UserError(f"line {number}: {str(error).removeprefix('settings: ')}") from None


def check(settings: Settings) -> None:
    """Raise UserError if params.yaml with the settings is invalid, or if it names a folder in
    data/pretrained or a corpus that does not exist."""
    tree, root = apply(settings), Path.cwd()
    prepare, _, train, *_ = params.check(tree, "settings", **sections.SECTIONS)
    init_from.check_exists(train.init_from, root)
    init_from.check_teachers_exist(train.distill_from, root)
    corpus.check_exists(prepare.corpus, root)


def prepare_text(settings: Settings, root: Path) -> Path:
    """Prepare the text in `root`, unless it is there. Returns the folder with the tokens."""
    [p] = params.check(apply(settings), "settings", prepare=PrepareParams)
    folder = root / hashlib.sha256(repr(p).encode()).hexdigest()
    if not folder.exists():
        (folder / "data").mkdir(parents=True)
        (folder / corpus.RAW).symlink_to(corpus.RAW.resolve())
        with contextlib.redirect_stdout(io.StringIO()):
            prepare.run(p, folder, folder, hide_progress=True)
    return folder / PREPARED


def build(
    settings: Settings, tokens: Path = PREPARED, make_trainer: MakeTrainer = Trainer
) -> tuple[Trainer, RuntimeParams]:
    """make_trainer: takes the arguments of Trainer."""
    model, train, runtime = params.check(
        apply(settings), "settings", model=ModelParams, train=TrainParams, runtime=RuntimeParams
    )
    where = device.resolve_device(runtime.device)
    precision = device.resolve_precision(train.precision, where)
    initial = pretrained.find(train.init_from, Path.cwd())
    found = teachers.find(train.distill_from, Path.cwd())
    data = token_files.read(tokens)
    token_files.check_length(data.val, "validation", model.block_size)
    trainer = make_trainer(model, train, data, where, precision, initial, teachers=found)
    return trainer, runtime


def measure(
    settings: Settings, shown: str, tokens: Path, make_trainer: MakeTrainer = Trainer
) -> tuple[float, str]:
    """Train with the settings. Prints a row. Returns the last validation loss, and the row.

    Call it in a process of its own: it may restrict the process to some of the GPUs.
    """
    gpus.reserve(Path.cwd())
    trainer, runtime = build(settings, tokens, make_trainer)
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        train_stage.train(trainer, runtime, Path(folder), NoLogger())
    seconds = time.perf_counter() - started
    best, last = trainer.early_stopping, trainer.history.rows[-1]
    row = f"{last['val_loss']:16.4f} {best.best_loss:9.4f} {best.best_step:9,}"
    row += f" {last['train_loss']:10.3f} {seconds:9.1f}   {shown}"
    print(row, flush=True)
    return last["val_loss"], row


def in_processes(function: Callable[..., T], tasks: list[tuple[Any, ...]], jobs: int) -> list[T]:
    """Call the function with the arguments in each task, each in a new process, `jobs` at once."""
    (runtime,) = params.load(runtime=RuntimeParams)
    os.environ |= sweep.job_environment(jobs, device.resolve_device(runtime.device).type)
    with multiprocessing.get_context("spawn").Pool(jobs, maxtasksperchild=1) as pool:
        results = pool.starmap(function, tasks, chunksize=1)
        pool.close()
        pool.join()  # a process that is terminated would leave semaphores behind
    return results


def parse(parser: argparse.ArgumentParser) -> tuple[argparse.Namespace, Settings]:
    """The options, with --jobs, --variant and --corpus, and the settings of the last two."""
    parser.add_argument("--jobs", type=int, default=1, help="trainings at once")
    parser.add_argument("--variant", help="one of variants/, instead of params.yaml alone")
    parser.add_argument("--corpus", help="instead of that of params.yaml and the variant")
    options = parser.parse_args()
    if options.jobs < 1:
        raise UserError("--jobs must be at least 1")
    base = variants.read(options.variant) if options.variant else {}
    if options.corpus:
        base["prepare.corpus"] = options.corpus
    return options, base


def main() -> None:
    options, base = parse(argparse.ArgumentParser(description=__doc__.splitlines()[0]))
    lines = read_lines(sys.stdin.buffer, base)
    with tempfile.TemporaryDirectory() as root:
        tasks = []
        for line in lines:
            settings = base | line
            tokens = prepare_text(settings, Path(root))
            shown = " ".join(f"{key.split('.')[1]}={value}" for key, value in line.items())
            tasks.append((settings, shown, tokens))
        print(HEAD, flush=True)
        results = in_processes(measure, tasks, options.jobs)
    if len(results) > 1:
        print(HEAD.replace("validation", "best first"))
        print(*(row for _, row in sorted(results)), sep="\n")


if __name__ == "__main__":
    with one_line_errors():
        main()
