"""The time from process start until a given validation loss is reached.

    python -m benchmarks.race --loss 4.77 seed-30m quick-30m

The variants are trained in turn, in temporary projects with prepared text, and without early
stopping. If a variant does not reach the loss, its row shows its best loss instead.
"""

import argparse
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks import project
from benchmarks.project import Command
from folio import device, params
from folio.errors import one_line_errors


def train(folder: Path, variant: str) -> tuple[float, list[dict[str, Any]]]:
    """Train a variant. Returns the start time in seconds, and the rows with a validation loss."""
    overlay: dict[str, dict] = {section: {} for section in params.SECTIONS}
    overlay["train"] = {"patience": None}
    project.write_project(folder, variant, overlay)
    Command(folder, "stages.prepare").finish()
    started = time.time()
    Command(folder, "stages.train").finish()
    return started, [row for row in project.read_history(folder) if "val_loss" in row]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("variants", nargs="+", help="files in variants/, without .yaml")
    parser.add_argument("--loss", type=float, default=4.77, help="validation loss in nats/token")
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    where = device.describe(device.resolve_device("auto"))
    print(f"seconds to a validation loss of {options.loss} on {where}; medians")
    found: dict[str, list[tuple[float, ...]]] = {name: [] for name in options.variants}
    for _ in range(options.rounds):
        for name in options.variants:
            with tempfile.TemporaryDirectory() as folder:
                started, rows = train(Path(folder) / "project", name)
            reached = next((row for row in rows if row["val_loss"] <= options.loss), None)
            row = reached or min(rows, key=lambda row: row["val_loss"])
            seconds, ended = (r["time"] / 1000 - started for r in (row, rows[-1]))
            found[name].append((seconds, row["step"], row["val_loss"], ended, bool(reached)))
    print(f"{'':16}reached   seconds   at step   val loss   last step, seconds")
    for name, results in found.items():
        *columns, in_time = zip(*results, strict=True)
        seconds, step, loss, ended = map(median, columns)
        times = f"{seconds:10.1f}{step:10,.0f}{loss:11.4f}{ended:15.1f}"
        print(f"{name:<16}{sum(in_time)} of {len(results)}{times}")


if __name__ == "__main__":
    with one_line_errors():
        main()
