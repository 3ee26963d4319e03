"""Time from the start of a process to the first generated token and to the first training step.

    python -m benchmarks.startup

Trains the model of params.yaml for two steps in a temporary project. Then starts each command
--rounds times, in turn, with the files in the operating system's cache. Importing PyTorch, in a
process that does nothing else, is the part of these times that Folio cannot change.
"""

import argparse
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

from benchmarks import project
from benchmarks.project import Command
from folio.errors import one_line_errors

PROMPT = "ROMEO:\n"
IMPORT = ("-c", "import torch; print(torch.__version__, flush=True)")
SAMPLE = ("-m", "folio", "sample", PROMPT, "--tokens", "2", "--seed", "1")


def measure(folder: Path, words: tuple[str, ...], skipped: int) -> tuple[float, float]:
    """The seconds from the start of `python WORDS` to its first byte of output after `skipped`
    bytes, and to its exit."""
    command, together = [sys.executable, *words], subprocess.STDOUT
    started = time.monotonic()
    with subprocess.Popen(command, cwd=folder, stdout=subprocess.PIPE, stderr=together) as process:
        assert process.stdout
        process.stdout.read(skipped + 1)
        first = time.monotonic() - started
        rest = process.stdout.read()
    if process.returncode:
        raise RuntimeError(f"the command failed: {rest.decode()[-2000:]}")
    return first, time.monotonic() - started


def measure_first_step(folder: Path) -> float:
    """The seconds from the start of the train stage to the end of its first step, without an MLflow
    store."""
    for leftover in (".checkpoints", "models/training", "mlruns"):
        shutil.rmtree(folder / leftover, ignore_errors=True)
    (folder / "mlflow.db").unlink(missing_ok=True)
    started = time.time()
    Command(folder, "stages.train").finish()
    return project.read_history(folder)[0]["time"] / 1000 - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--variant", help="one of the files in variants/, without .yaml")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="startup-", ignore_cleanup_errors=True) as temporary:
        folder = Path(temporary) / "base"
        settings = {"steps": 2, "eval_interval": 2, "warmup_steps": 1}
        overlay = {"train": settings, "runtime": {"log_interval": 1}}
        project.write_project(folder, options.variant, overlay)
        project.repro(folder, "train").finish()
        rounds = []
        for _ in range(options.rounds):
            imported, _ = measure(folder, IMPORT, 0)
            first_token, end = measure(folder, SAMPLE, len(PROMPT))
            rounds.append((imported, first_token, end, measure_first_step(folder)))
        print(project.headline(folder), f"medians of {options.rounds}, seconds", sep="; ")
    names = ["import of PyTorch alone", "sample: to the first token", "sample: to its exit"]
    names.append("train: to the end of the first step")
    for name, times in zip(names, zip(*rounds, strict=True), strict=True):
        print(f"{name:<40}{median(times):6.2f}")


if __name__ == "__main__":
    with one_line_errors():
        main()
