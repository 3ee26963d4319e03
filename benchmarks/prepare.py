"""The time and memory that the prepare stage takes, on one core and on all cores.

    python -m benchmarks.prepare --sizes 32 128 --rounds 5
    python -m benchmarks.prepare --sizes 2048 --rounds 1        seven minutes on two cores

The texts are the plays, repeated. The stage runs as a separate process, alternating between one
core, where it encodes in one process, and all cores. A row shows the median time of the whole
command; rate and speedup exclude startup, which is the time for a text of one line. The peak is the
resident memory of the largest process. All runs on a text must create the same files.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

from folio import files
from folio.corpus import shakespeare
from folio.errors import one_line_errors

ROOT = Path(__file__).parent.parent


def write_text(path: Path, mebibytes: int) -> None:
    """Write the plays, repeated up to the given size; for 0 MiB, only their first line."""
    text, _ = shakespeare.load_all_plays()
    plays = text.encode()
    left = mebibytes << 20 or plays.index(b"\n")
    with path.open("wb") as file:
        while left:
            left -= file.write(plays[:left])  # nearly all characters are one byte long


def prepare(folder: Path, cores: set[int]) -> tuple[float, float]:
    """Run the stage on these cores. Returns the time in seconds and the peak memory in MiB."""
    started = time.perf_counter()
    process = subprocess.Popen(
        [sys.executable, "-m", "stages.prepare"],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        stdout=subprocess.DEVNULL,
        preexec_fn=lambda: os.sched_setaffinity(0, cores),
    )
    _, status, used = os.wait4(process.pid, 0)
    seconds = time.perf_counter() - started
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        sys.exit(f"prepare failed with exit status {process.returncode}")
    return seconds, used.ru_maxrss / 1024


def hash_outputs(folder: Path) -> dict[str, str]:
    """The sha256 of each file that the stage creates."""
    paths = [path for path in (folder / "data").rglob("*") if path.is_file()]
    return {str(path): files.sha256(path) for path in paths if "raw" not in path.parts}


def compare(folder: Path, mebibytes: int, rounds: int, startup: list[float]) -> list[float]:
    """Print a text's rows: one core, then all cores. Returns the median times in seconds."""
    write_text(folder / "data/raw/text.txt", mebibytes)
    every = os.sched_getaffinity(0)
    choices, outs = [{min(every)}, every], []
    runs: list[list[tuple[float, float]]] = [[], []]  # for each choice, (seconds, MiB) of each run
    for _ in range(rounds):
        for cores, measured in zip(choices, runs, strict=True):
            measured.append(prepare(folder, cores))
            outs.append(hash_outputs(folder))
    times = [median(seconds for seconds, _ in measured) for measured in runs]
    alone = [time - start for time, start in zip(times, startup, strict=True)]
    for cores, seconds, net, measured in zip(choices, times, alone, runs, strict=True):
        print(f"{mebibytes:8,}  {len(cores):5}  {seconds:7.1f}", end="")
        print(f"  {times[0] / seconds:13.2f}", end="")
        print(f"  {mebibytes / net:9.2f}  {alone[0] / net:7.2f}" if mebibytes else " " * 20, end="")
        print(f"  {max(peak for _, peak in measured):8.0f}", flush=True)
    if any(each != outs[0] for each in outs):
        sys.exit("the runs did not create the same files")
    return times


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--sizes", type=int, nargs="+", default=[32, 128], help="sizes of the texts in MiB"
    )
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    print(f"medians, rounds: {options.rounds}; MiB/s and speedup exclude startup")
    print("text MiB  cores  total s  total speedup      MiB/s  speedup  peak MiB")
    with tempfile.TemporaryDirectory(prefix="prepare-") as place:
        folder = Path(place)
        (folder / "data/raw").mkdir(parents=True)
        params = (ROOT / "params.yaml").read_text(encoding="utf-8")
        params = params.replace("corpus: tinyshakespeare ", "corpus: data/raw/text.txt ")
        (folder / "params.yaml").write_text(params, encoding="utf-8")
        startup = compare(folder, 0, options.rounds, [0.0, 0.0])
        for size in options.sizes:
            compare(folder, size, options.rounds, startup)
    print("all runs on the same text created the same files")


if __name__ == "__main__":
    with one_line_errors():
        main()
