"""How long the prepare stage takes, and what memory, on one core and on all.

    python -m benchmarks.prepare --sizes 32 128 --rounds 5
    python -m benchmarks.prepare --sizes 2048 --rounds 1        seven minutes on two cores

The texts are the plays, repeated. The stage runs as a process of its own, in turn held to one core,
where it encodes in one thread, and on all. A row gives the median time of the whole command; rate
and gain are without the start-up, which is the time for a text of one line. The peak is the
resident memory of the process. All that the stage makes is compared: it is to be the same.
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

ROOT = Path(__file__).parent.parent
PARAMS = """
prepare:
  corpus: data/raw/text.txt
  validation_fraction: 0.1
  report_batch_size: 8
  report_block_size: 128
"""


def write_text(path: Path, mebibytes: int) -> None:
    """The plays, again and again, to a size; for 0 MiB their first line."""
    markdown = shakespeare.plays()
    plays = (shakespeare.other_plays(markdown) + shakespeare.tinyshakespeare(markdown)).encode()
    left = mebibytes << 20 or plays.index(b"\n")
    with path.open("wb") as file:
        while left:
            left -= file.write(plays[:left])  # of one byte a character, nearly all of them


def prepare(folder: Path, cores: set[int]) -> tuple[float, float]:
    """Run the stage on these cores: seconds, and the most memory that it held, in MiB."""
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
        sys.exit(f"prepare ended with {process.returncode}")
    return seconds, used.ru_maxrss / 1024


def made(folder: Path) -> dict[str, str]:
    """The sha256 of each file that the stage makes."""
    paths = [path for path in (folder / "data").rglob("*") if path.is_file()]
    return {str(path): files.sha256(path) for path in paths if "raw" not in path.parts}


def compare(folder: Path, mebibytes: int, rounds: int, start_up: list[float]) -> list[float]:
    """Print the rows of a text, one core and all in turn; their median times, in seconds."""
    write_text(folder / "data/raw/text.txt", mebibytes)
    every = os.sched_getaffinity(0)
    ways, turns, outs = [{min(every)}, every], [], []
    for _ in range(rounds):
        turns.append([])
        for cores in ways:
            turns[-1].append(prepare(folder, cores))
            outs.append(made(folder))
    ways_turns = [list(zip(*way, strict=True)) for way in zip(*turns, strict=True)]
    times = [median(seconds) for seconds, _ in ways_turns]
    alone = [time - start for time, start in zip(times, start_up, strict=True)]
    for cores, seconds, net, (_, peaks) in zip(ways, times, alone, ways_turns, strict=True):
        print(f"{mebibytes:8,}  {len(cores):5}  {seconds:7.1f}", end="")
        print(f"  {times[0] / seconds:13.2f}", end="")
        print(f"  {mebibytes / net:9.2f}  {alone[0] / net:4.2f}" if mebibytes else " " * 17, end="")
        print(f"  {max(peaks):8.0f}", flush=True)
    if any(each != outs[0] for each in outs):
        sys.exit("the runs did not make the same files")
    return times


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sizes", type=int, nargs="+", default=[32, 128], help="of texts, in MiB")
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    print(f"medians of {options.rounds} rounds; MiB/s and gain are without the start-up")
    print("text MiB  cores  whole s  gain of whole      MiB/s  gain  peak MiB")
    with tempfile.TemporaryDirectory(prefix="prepare-") as place:
        folder = Path(place)
        (folder / "data/raw").mkdir(parents=True)
        (folder / "params.yaml").write_text(PARAMS)
        start_up = compare(folder, 0, options.rounds, [0.0, 0.0])
        for size in options.sizes:
            compare(folder, size, options.rounds, start_up)
    print("every run of a text made the same files")


if __name__ == "__main__":
    main()
