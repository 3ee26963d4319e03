"""prepare on a large corpus of all kinds of files: speed, memory, and what a kill costs.

    python -m benchmarks.big_corpus --gigabytes 1 2 5
    python -m benchmarks.big_corpus --gigabytes 5 --kill 20

Writes a corpus of documents of web-like lengths, made of the sentences of the plays in random
order, in equal parts as .txt, .jsonl, .jsonl.gz, .jsonl.zst and .parquet; a gigabyte is 10^9 bytes
of text. Runs the stage as a separate process, on all cores. The peak is the sum of the resident
memory of all its processes (pages that they share count several times; mapped files are left out).
With --kill N, kills it with SIGKILL N times at random moments, and compares the files with those of
an uninterrupted run. The corpus and the results are removed at the end.
"""

import argparse
import contextlib
import gzip
import itertools
import json
import os
import random
import re
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pyarrow as pa
import pyarrow.parquet as pq

from folio import files
from folio.corpus import shakespeare
from folio.errors import one_line_errors

ROOT = Path(__file__).parent.parent
KINDS = ("txt", "jsonl", "jsonl.gz", "jsonl.zst", "parquet")
FILE = 250_000_000  # bytes of text in a file
RATES = re.compile(r"(\d+)/(\d+)")


def documents(seed: int, size: int) -> Iterator[str]:
    """Yield documents with `size` bytes of text altogether; half of them have over 2,000."""
    text, _ = shakespeare.load_all_plays()
    sentences = [each.strip() + " " for each in re.split(r"(?<=[.?!])\s+", text) if each.strip()]
    chance = random.Random(seed)
    while size > 0:
        length, parts = min(int(chance.lognormvariate(7.6, 1.0)) + 50, size), []
        while length > 0:
            parts += chance.choices(sentences, k=1 + length // 200)
            length -= sum(map(len, parts[-(1 + length // 200) :]))
        document = "".join(parts)
        size -= len(document)
        yield document


def write(path: Path, texts: Iterator[str]) -> None:
    """Write documents to a file of the kind that its suffix says."""
    lines = (json.dumps({"text": text, "id": number}) + "\n" for number, text in enumerate(texts))
    if path.suffix == ".parquet":
        schema = pa.schema([("text", pa.string())])
        with pq.ParquetWriter(path, schema, compression="zstd") as writer:
            while group := list(itertools.islice(texts, 20_000)):
                writer.write_table(pa.table({"text": group}, schema))
    elif path.suffix == ".txt":
        with path.open("w", encoding="utf-8") as file:
            file.writelines(f"{text}\n\n" for text in texts)
    elif path.suffix == ".jsonl":
        with path.open("w", encoding="utf-8") as file:
            file.writelines(lines)
    elif path.suffix == ".gz":
        with gzip.open(path, "wt", compresslevel=1, encoding="utf-8") as file:
            file.writelines(lines)
    else:
        with pa.CompressedOutputStream(str(path), "zstd") as stream:
            for line in lines:
                stream.write(line.encode())


def grow(folder: Path, text: int, before: int) -> None:
    """Write files until they contain `text` bytes of text; they contain `before`."""
    for start in range(before, text, FILE):
        seed = len([*folder.iterdir()])
        kind = KINDS[seed % len(KINDS)]
        write(folder / f"{seed:04d}.{kind}", documents(seed, min(FILE, text - start)))


def start(project: Path) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-m", "stages.prepare"],
        cwd=project,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        stdout=subprocess.DEVNULL,
        start_new_session=True,
    )


class Memory(threading.Thread):
    """Samples the anonymous memory of a process and its children, in MiB."""

    def __init__(self, pid: int) -> None:
        super().__init__(daemon=True)
        self.peak, self.largest, self._process = 0.0, 0.0, psutil.Process(pid)
        self.encoded: float | None = None  # when the last worker ended
        self.start()

    def run(self) -> None:
        with contextlib.suppress(psutil.Error):
            while True:
                children = self._process.children()
                if len(children) > 0:
                    self.encoded = time.perf_counter()
                used = []
                for each in [self._process, *children]:
                    with contextlib.suppress(psutil.NoSuchProcess):
                        memory = each.memory_info()
                        used.append((memory.rss - memory.shared) / (1 << 20))
                self.peak = max(self.peak, sum(used))
                self.largest = max([self.largest, *used])
                time.sleep(0.2)


def measure(project: Path, gigabytes: float) -> None:
    """Run prepare and print a row."""
    size = sum(path.stat().st_size for path in (project / "data/raw").rglob("*") if path.is_file())
    started = time.perf_counter()
    process = start(project)
    memory = Memory(process.pid)
    if process.wait():
        sys.exit(f"prepare failed with exit status {process.returncode}")
    seconds = time.perf_counter() - started
    encoding = (memory.encoded or started) - started
    tokens = json.loads((project / "data/diagnostics.json").read_text())["tokens"]
    print(
        f"{gigabytes:4g}  {size / 1e9:8.2f}  {tokens / 1e6:9,.0f}  {seconds:7.0f}  {encoding:8.0f}"
        f"  {gigabytes * 1e3 / seconds:7.1f}  {memory.peak:8.0f}  {memory.largest:11.0f}",
        flush=True,
    )


def hash_outputs(project: Path) -> dict[str, str]:
    paths = [path for path in (project / "data").rglob("*") if path.is_file()]
    return {str(path): files.sha256(path) for path in paths if "raw" not in path.parts}


def kill(project: Path, times: int, seconds: float) -> None:
    """Kill prepare at random moments, let it finish, and print what that cost."""
    expected, chance = hash_outputs(project), random.Random(1)
    shutil.rmtree(project / "data/prepared")
    running, kept = 0.0, []
    for _ in range(times):
        started = time.perf_counter()
        process = start(project)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(chance.uniform(2, 2 * seconds / times))
        os.killpg(process.pid, 9)
        process.wait()
        running += time.perf_counter() - started
        kept.append(len([*project.glob(".checkpoints/prepare-*/[!.]*.npz")]))
    started = time.perf_counter()
    if start(project).wait():
        sys.exit("the run after the kills failed")
    running += time.perf_counter() - started
    same = hash_outputs(project) == expected
    print(f"{times} kills: {running:.0f} s altogether, {running - seconds:.0f} s more than without")
    print(f"segments after each kill: {kept}")
    print("the files are the same, byte for byte" if same else "THE FILES DIFFER")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--gigabytes", type=float, nargs="+", default=[1, 2, 5])
    parser.add_argument("--kill", type=int, default=0, metavar="N", help="the last size, N times")
    parser.add_argument("--folder", help="where to write; default: the temporary folder")
    options = parser.parse_args()
    print(f"{len(os.sched_getaffinity(0))} cores; MB/s of text, over the whole command")
    print("  GB  on disk GB  M tokens  total s  encode s    MB/s  peak MiB  one process")
    with tempfile.TemporaryDirectory(prefix="big-corpus-", dir=options.folder) as place:
        project, before = Path(place), 0
        (project / "data/raw/set").mkdir(parents=True)
        params = (ROOT / "params.yaml").read_text(encoding="utf-8")
        params = params.replace("corpus: tinyshakespeare ", "corpus: data/raw/set ")
        params = params.replace("validation_fraction: 0.1 ", "validation_fraction: 0.005 ")
        (project / "params.yaml").write_text(params, encoding="utf-8")
        seconds = 0.0
        for gigabytes in options.gigabytes:
            grow(project / "data/raw/set", int(gigabytes * 1e9), before)
            before = int(gigabytes * 1e9)
            started = time.perf_counter()
            measure(project, gigabytes)
            seconds = time.perf_counter() - started
        if options.kill:
            kill(project, options.kill, seconds)


if __name__ == "__main__":
    with one_line_errors():
        main()
