"""The duration of a training step with MLflow stores that respond, refuse connections or hang.

    python -m benchmarks.outage

Trains a tiny model (or --variant) in a temporary project, with each store in turn.
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
from folio.errors import one_line_errors


def compare(temporary: Path, options: argparse.Namespace) -> None:
    """Print the duration of a step with each kind of store.

    The stores take turns, so that load on the machine affects all of them equally.
    """
    folder = temporary / "base"
    project.write_project(folder, options.variant, project.tiny(options, eval_interval=100))
    project.repro(folder, "prepare").finish()
    silent = socket.create_server(("127.0.0.1", 0))  # the kernel accepts connections; nobody reads
    with Server(temporary) as server:
        server.start()
        stores = {
            "a local store": "",
            "a server that responds": server.uri,  # the ratios are relative to this one
            "a port that is closed": f"http://127.0.0.1:{project.free_port()}",
            "a server that hangs": f"http://127.0.0.1:{silent.getsockname()[1]}",
        }
        turns = [[measure(folder, uri) for uri in stores.values()] for _ in range(options.rounds)]
    print(f"{project.headline(folder)}; medians, rounds of {options.steps} steps: {options.rounds}")
    print("MLflow is                   ms/step  ratio  ms/step with evaluations  ratio  command, s")
    stores_turns = zip(*turns, strict=True)
    medians = [[median(column) for column in zip(*each, strict=True)] for each in stores_turns]
    for name, (step, between, whole) in zip(stores, medians, strict=True):
        ratios = step / medians[1][0], between / medians[1][1]
        print(f"{name:<27} {step:8.2f}  {ratios[0]:5.2f}", end="")
        print(f"  {between:24.2f}  {ratios[1]:5.2f}  {whole:10.1f}")


def measure(folder: Path, uri: str) -> tuple[float, float, float]:
    """Return ms/step without and with evaluations and checkpoints, and the total time in
    seconds."""
    for leftover in (".checkpoints", "models"):
        shutil.rmtree(folder / leftover, ignore_errors=True)
    started = time.monotonic()
    Command(folder, "stages.train", uri=uri).finish()
    whole, rows = time.monotonic() - started, project.read_history(folder)
    p = yaml.safe_load((folder / "params.yaml").read_text())
    tokens = p["train"]["batch_size"] * p["train"]["accumulation"] * p["model"]["block_size"]
    speed = median(row["tokens_per_second"] for row in rows)
    rows = rows[len(rows) // 10 :]  # without the warm-up of the process
    between = (rows[-1]["time"] - rows[0]["time"]) / (rows[-1]["step"] - rows[0]["step"])
    return 1000 * tokens / speed, between, whole


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    project.add_options(parser, steps=500)
    with tempfile.TemporaryDirectory(prefix="outage-", ignore_cleanup_errors=True) as temporary:
        compare(Path(temporary), parser.parse_args())


if __name__ == "__main__":
    with one_line_errors():
        main()
