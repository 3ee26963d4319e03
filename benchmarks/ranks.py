"""SIGKILL of random processes of a training run on several: compares it with an uninterrupted run.

    python -m benchmarks.ranks --kills 20                              # 2 processes on a CPU
    python -m benchmarks.ranks --kills 6 --device cuda --parallel fsdp --precision bf16

Each run is one `dvc repro`, which starts the processes again after each kill. Compares the weights
byte by byte, the history row by row and MLflow's data point by point.
"""

import argparse
import random
import sys
import tempfile
import time
from pathlib import Path

import psutil

from benchmarks import project
from benchmarks.comparison import compare_mlflow, compare_outs
from benchmarks.kills import latest_step
from benchmarks.project import Command, repro, trainers
from folio.errors import one_line_errors


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    project.add_options(parser, steps=2_000)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--parallel", choices=("ddp", "fsdp"), default="ddp")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    overlay = project.tiny(options, eval_interval=20)
    overlay["train"]["parallel"] = options.parallel
    if options.parallel == "fsdp":  # Muon and factored updates need whole matrices
        overlay["train"] |= {"optimizer": "adamw", "factored_embedding": False}
    overlay["runtime"] |= {"processes": options.processes, "device": options.device}
    with tempfile.TemporaryDirectory() as top:
        killed, uninterrupted = Path(top, "killed/project"), Path(top, "uninterrupted/project")
        for folder in (uninterrupted, killed):
            project.write_project(folder, options.variant, overlay)
        repro(uninterrupted).finish()
        print(f"{project.headline(uninterrupted)}, {options.parallel}", flush=True)
        command = repro(killed)
        ranks = kill_ranks(command, killed, options)
        status = command.wait()
        found = [f"dvc repro exited with {status}: {command.output[-2000:]}"] if status else []
        if not status:
            found += compare_outs(uninterrupted, killed)
            found += compare_mlflow(killed, f"sqlite:///{killed / 'mlflow.db'}")
        counts = ", ".join(f"{ranks.count(n)} of process {n}" for n in range(options.processes))
        print(f"{len(ranks)} kills ({counts}): {'; '.join(found) or 'all equal'}")
    sys.exit(bool(found) or len(ranks) < options.kills)


def kill_ranks(command: Command, folder: Path, options: argparse.Namespace) -> list[int]:
    """Kill random processes at random times while the command runs. Returns their ranks.

    One kill in four comes while the processes start, the others after some steps.
    """
    rng, last = random.Random(options.seed), 0
    ranks: list[int] = []
    old: set[psutil.Process] = set()
    while len(ranks) < options.kills and command.process.poll() is None:
        time.sleep(0.05)
        step = latest_step(folder)
        if step >= options.steps - 100:
            break  # the run is about to end
        workers = [p for p in trainers(folder) if p.ppid() in {q.pid for q in trainers(folder)}]
        if len(workers) < options.processes or old & set(workers):
            continue
        if rng.random() < 0.25:
            time.sleep(rng.uniform(0, 8))
        else:
            target = last + rng.uniform(1, 0.9 * options.steps / options.kills)
            while latest_step(folder) < target and command.process.poll() is None:
                time.sleep(0.02)
            time.sleep(rng.uniform(0, 0.3))
        last = latest_step(folder)
        workers.sort(key=rank_of)
        rank = rng.randrange(len(workers))
        old = set(workers)
        if workers[rank].is_running():
            workers[rank].kill()
            ranks.append(rank)
            print(f"kill {len(ranks)}: process {rank}, step {last}", file=sys.stderr, flush=True)
    return ranks


def rank_of(process: psutil.Process) -> int:
    return int(process.environ().get("RANK", 0))


if __name__ == "__main__":
    with one_line_errors():
        main()
