"""What a step costs with each kind of MLflow store, there or away.

    python -m benchmarks.outage

Trains a tiny model (or --variant) in a project of its own, with each store in turn.
"""

import argparse
import shutil
import socket
import tempfile
import time
from pathlib import Path
from statistics import median

import yaml

from benchmarks import project
from benchmarks.project import Command, Server


def compare(place: Path, options: argparse.Namespace) -> None:
    """Print a step's time with each kind of store, in turn, so that a busy machine hits all."""
    folder = place / "base"
    project.write_project(folder, options.variant, project.tiny(options, every=100))
    project.repro(folder, "prepare").finish()
    silent = socket.create_server(("127.0.0.1", 0))  # the kernel accepts; nobody reads
    with Server(place) as server:
        server.start()
        stores = {
            "local store": "",
            "server that answers": server.address,  # the others are measured by it
            "server that refuses": f"http://127.0.0.1:{project.free_port()}",
            "address that never answers": f"http://127.0.0.1:{silent.getsockname()[1]}",
        }
        turns = [
            [measure(folder, address) for address in stores.values()] for _ in range(options.rounds)
        ]
    print(
        f"{project.headline(folder)}; medians of {options.rounds} rounds of {options.steps} steps"
    )
    print("MLflow is a                 ms a step  ratio  with all between  ratio  whole command, s")
    stores_turns = zip(*turns, strict=True)
    medians = [[median(column) for column in zip(*each, strict=True)] for each in stores_turns]
    for name, (step, between, whole) in zip(stores, medians, strict=True):
        ratios = step / medians[1][0], between / medians[1][1]
        print(f"{name:<27} {step:9.2f}  {ratios[0]:5.2f}", end="")
        print(f"  {between:16.2f}  {ratios[1]:5.2f}  {whole:16.1f}")


def measure(folder: Path, address: str) -> tuple[float, float, float]:
    """ms a step alone; the same with evaluations, checkpoints and history; s of the command."""
    for left in (".checkpoints", "models"):
        shutil.rmtree(folder / left, ignore_errors=True)
    started = time.monotonic()
    Command(folder, "stages.train", address=address).finish()
    whole, rows = time.monotonic() - started, project.read_history(folder)
    p = yaml.safe_load((folder / "params.yaml").read_text())
    tokens = p["train"]["batch_size"] * p["train"]["accumulation"] * p["model"]["block_size"]
    speed = median(row["tokens_per_second"] for row in rows)
    rows = rows[len(rows) // 10 :]  # the first steps of a process warm up
    between = (rows[-1]["time"] - rows[0]["time"]) / (rows[-1]["step"] - rows[0]["step"])
    return 1000 * tokens / speed, between, whole


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    project.add_options(parser, steps=500)
    with tempfile.TemporaryDirectory(prefix="outage-", ignore_cleanup_errors=True) as place:
        compare(Path(place), parser.parse_args())


if __name__ == "__main__":
    main()
