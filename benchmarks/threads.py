"""Generation with all threads and with the threads that few_threads chooses, idle and busy.

    python -m benchmarks.threads --busy 2

Samples as the page does (temperature 0.8, top-p 0.95), within the context and beyond it, with
models of random weights. Prints tokens/s: medians over the tokens of each text. --busy: the number
of processes that compute in a loop during the second half. Requires no data.
"""

import argparse
import itertools
import multiprocessing
import os
import time
from statistics import median

import torch

from folio.errors import one_line_errors
from folio.gpt.model import GPT, ModelParams
from folio.inference import threads
from folio.inference.generation import generate

# n_layer, n_head, n_embd, block_size: params.yaml, seed-30m, gpt2-124m
SIZES = ((2, 4, 128, 64), (6, 6, 384, 128), (12, 12, 768, 1_024))
VOCAB_SIZE = 50_257


def build(n_layer: int, n_head: int, n_embd: int, block_size: int) -> GPT:
    torch.manual_seed(1)
    sizes = {"n_layer": n_layer, "n_head": n_head, "n_embd": n_embd, "block_size": block_size}
    return GPT(ModelParams(**sizes, dropout=0.0), VOCAB_SIZE).eval()


def speed(model: GPT, prompt: int, tokens: int, small: float) -> float:
    """Tokens/s. small: the value of threads._SMALL; 0 always uses all threads."""
    threads._SMALL = small  # type: ignore[assignment]
    times = [time.perf_counter()]
    generator = torch.Generator().manual_seed(1)
    for _ in generate(model, [1] * prompt, tokens, 0.8, None, 0.95, generator):
        times.append(time.perf_counter())
    return 1 / median(b - a for a, b in itertools.pairwise(times[1:]))


def spin() -> None:
    while True:
        pass


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--busy", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--tokens", type=int, default=16)
    options = parser.parse_args()
    small, models = threads._SMALL, [(sizes, build(*sizes)) for sizes in SIZES]
    print(f"{torch.get_num_threads()} threads, load {os.getloadavg()[0]:.1f}; tokens/s")
    print(f"{'':<8} {'model':<14} {'text':<18} {'all threads':>11} {'few_threads':>11}")
    for busy in sorted({0, options.busy}):
        context = multiprocessing.get_context("spawn")
        loops = [context.Process(target=spin, daemon=True) for _ in range(busy)]
        for loop in loops:
            loop.start()
        for sizes, model in models:
            name = "/".join(map(str, sizes[:3]))
            for text, prompt in (("within its context", 8), ("beyond it", sizes[3])):
                tokens = options.tokens if prompt * sizes[2] < 100_000 else 4
                found = [speed(model, prompt, tokens, each) for each in (0, small)]
                kind = f"{busy} busy"
                print(
                    f"{kind:<8} {name:<14} {text:<18} {found[0]:11,.1f} {found[1]:11,.1f}",
                    flush=True,
                )
        for loop in loops:
            loop.kill()


if __name__ == "__main__":
    with one_line_errors():
        main()
