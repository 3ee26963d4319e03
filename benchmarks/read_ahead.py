"""A training step with the tokens on the GPU, read ahead from files, and read when they are needed.

    python -m benchmarks.read_ahead                         6/6/384 and 124M, 2 * 10^9 tokens
    python -m benchmarks.read_ahead --tokens 1e6 --steps 3 --variants seed-30m      a try on a CPU

Writes random tokens to a file, and drops it from the page cache, so that nearly all windows come
from the disk (--cached: reads the file first). The three ways take turns with the same model, and
the order of the windows is computed, as for a large corpus. The last column is the time that the
host spends in `Batches.windows`. On a CPU, where nothing is copied, the first two are direct
reading and the threads.
"""

import argparse
import os
import tempfile
import time
from pathlib import Path
from statistics import median

import numpy as np
import torch

from benchmarks import step as step_benchmark
from benchmarks.step import BETAS, CLIP, RATE, WEIGHT_DECAY, Work
from folio import device
from folio.errors import one_line_errors
from folio.gpt.model import GPT
from folio.tokens import batches as module
from folio.tokens import tokenizer
from folio.tokens.batches import Batches
from folio.tokens.read_ahead import ReadAhead
from folio.training import optimizers
from folio.training.step import TrainStep
from folio.training.weights import Weights

_PIECE = 10_000_000  # tokens that are written at once


def write_tokens(path: Path, count: int) -> np.ndarray:
    """Write random tokens to a file, and map it."""
    random = np.random.default_rng(0)
    with path.open("wb") as file:
        for start in range(0, count, _PIECE):
            size = min(_PIECE, count - start)
            file.write(random.integers(tokenizer.VOCAB_SIZE, size=size, dtype=np.uint16).data)
    return np.memmap(path, dtype="<u2", mode="r")


def drop_from_cache(path: Path) -> None:
    with path.open("rb+") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def build_ways(tokens: np.ndarray, work: Work) -> dict[str, Batches]:
    """The three ways to read; each has its own seed, so that none reads what another has read."""
    module.SHUFFLED = 0
    size, where = work.size.block_size, work.where
    module._MAX_SHARE = 1.0
    ways = {"on the device": Batches(tokens, size, 0, where)}
    module._MAX_SHARE = 0.0
    ways |= {"read ahead": Batches(tokens, size, 1, where)}
    ways |= {"read when needed": Batches(tokens, size, 2, where)}
    if where.type == "cuda":
        ways["read when needed"]._read = ways["read when needed"]._read_pinned
    else:
        ways["read ahead"]._read = ReadAhead(ways["read ahead"]._read_windows)
    return ways


def measure(ways: dict[str, Batches], work: Work, rounds: int, steps: int) -> None:
    """Print the median ms/step of each way, and the ms in Batches.windows."""
    model = GPT(work.size, tokenizer.VOCAB_SIZE).to(work.where)
    optimizer = optimizers.adamw(model.parameters(), WEIGHT_DECAY, BETAS)
    weights = Weights(model, work.precision)
    take_step = TrainStep(weights, optimizer, CLIP)
    wait = torch.cuda.synchronize if work.where.type == "cuda" else lambda: None
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in ways}
    firsts = dict.fromkeys(ways, 0)
    for _ in range(rounds + 1):
        for name, batches in ways.items():
            reading, started = 0.0, time.perf_counter()
            for _ in range(steps):
                before = time.perf_counter()
                batch = batches.windows(firsts[name], work.batch_size)
                reading += time.perf_counter() - before
                firsts[name] += work.batch_size
                take_step([batch], RATE)
            wait()
            times[name].append((time.perf_counter() - started, reading))
    alone = median(total for total, _ in times["on the device"][1:])
    for name, measured in times.items():
        total, reading = (median(values) for values in zip(*measured[1:], strict=True))
        ms, host = 1e3 * total / steps, 1e3 * reading / steps
        print(f"{name:<17}{ms:11.2f}{total / alone:11.3f}{host:18.2f}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--variants", nargs="+", default=["seed-30m", "gpt2-124m"])
    parser.add_argument("--tokens", type=float, default=2e9)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--steps", type=int, default=100, help="steps per round")
    parser.add_argument("--batch", type=int, help="windows per step; default: the variant's")
    parser.add_argument("--cached", action="store_true", help="read the file first")
    parser.add_argument("--folder", help="where to write the tokens; default: the temporary folder")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.folder) as place:
        path = Path(place) / "train.bin"
        tokens = write_tokens(path, int(options.tokens))
        for variant in options.variants:
            chosen = argparse.Namespace(variant=variant, batch=options.batch)
            work, title = step_benchmark.read_options(chosen)
            on = f"{work.precision}, {device.describe(work.where)}, PyTorch {torch.__version__}"
            cache = "cached" if options.cached else "not cached"
            print(f"{title}, {on}; {options.tokens:,.0f} tokens, {cache};", end=" ")
            print(f"medians, rounds of {options.steps} steps: {options.rounds}")
            print("tokens               ms/step   relative   ms in Batches")
            ways = build_ways(tokens, work)
            if options.cached:
                tokens.max()
            else:
                drop_from_cache(path)
            measure(ways, work, options.rounds, options.steps)


if __name__ == "__main__":
    with one_line_errors():
        main()
