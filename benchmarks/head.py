"""The cost of the output layer: fused or not, with a row for every token or for those that occur.

    python -m benchmarks.head

Measures the forward and backward passes of the output layer and the loss for 1,024 tokens, then a
whole step of the model in params.yaml. The alternatives are timed in turn; prints medians in ms.
Requires data/prepared (`dvc repro prepare`).
"""

import argparse
import time
from collections.abc import Callable
from statistics import median

import torch
from torch.nn import functional as F

from benchmarks.recipe import build
from folio import device
from folio.errors import one_line_errors
from folio.gpt.cross_entropy import linear_cross_entropy

TOKENS, ROUNDS = 1024, 7


def time_in_turn(contenders: dict[str, Callable[[], object]]) -> dict[str, float]:
    """The median time of each contender in ms, after a warm-up round."""
    times: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(ROUNDS + 1):
        for name, run in contenders.items():
            started = time.perf_counter()
            run()
            times[name].append(1e3 * (time.perf_counter() - started))
    return {name: median(taken[1:]) for name, taken in times.items()}


def time_head(rows: int, width: int) -> dict[str, float]:
    x = torch.randn(TOKENS, width, requires_grad=True)
    weight = (0.02 * torch.randn(rows, width)).requires_grad_()
    y = torch.randint(rows, (TOKENS,))

    def plain() -> None:
        torch.autograd.grad(F.cross_entropy(F.linear(x, weight), y), [x, weight])

    def fused() -> None:
        torch.autograd.grad(linear_cross_entropy(x, weight, None, y), [x, weight])

    return time_in_turn({"plain": plain, "fused": fused})


def build_step(tie: bool) -> Callable[[], object]:
    settings = {"train.tie_unseen_tokens": tie, "train.unseen_probability": 0.0}
    trainer, _ = build(settings | {"runtime.device": "cpu"})
    batch = trainer.batches(0)[:1]
    return lambda: trainer.step(batch, 1e-3)


def main() -> None:
    argparse.ArgumentParser(description=__doc__.splitlines()[0]).parse_args()
    print(f"on {device.describe(torch.device('cpu'))}; ms")
    print("output layer    rows   width    plain      fused   ratio")
    for rows in (50_257, 11_235):
        for width in (128, 256, 384):
            t = time_head(rows, width)
            ratio = t["plain"] / t["fused"]
            print(f"{rows:20,} {width:7} {t['plain']:8.0f} {t['fused']:10.0f} {ratio:7.2f}")
    t = time_in_turn({"every token": build_step(False), "tokens that occur": build_step(True)})
    for name, ms in t.items():
        print(f"a training step with a row for {name}: {ms:.0f} ms")


if __name__ == "__main__":
    with one_line_errors():
        main()
