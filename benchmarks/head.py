"""What the output head costs: in parts or whole, with all tokens' rows or those that occur.

    python -m benchmarks.head

Forward and backward of the head alone for 1,024 tokens, then a whole step of params.yaml's model.
The ways are timed in turn; medians, in ms. Needs data/prepared (`dvc repro prepare`).
"""

import time
from collections.abc import Callable
from statistics import median

import torch
from torch.nn import functional as F

from benchmarks.recipe import build
from folio import device
from folio.gpt import cross_entropy

TOKENS, ROUNDS = 1024, 7


def in_turn(ways: dict[str, Callable[[], object]]) -> dict[str, float]:
    """The median time of each way, in ms, after one round that does not count."""
    times = {name: [] for name in ways}
    for _ in range(ROUNDS + 1):
        for name, way in ways.items():
            started = time.perf_counter()
            way()
            times[name].append(1e3 * (time.perf_counter() - started))
    return {name: median(taken[1:]) for name, taken in times.items()}


def head_alone(rows: int, width: int) -> dict[str, float]:
    x = torch.randn(TOKENS, width, requires_grad=True)
    weight = (0.02 * torch.randn(rows, width)).requires_grad_()
    y = torch.randint(rows, (TOKENS,))

    def whole():
        torch.autograd.grad(F.cross_entropy(F.linear(x, weight), y), [x, weight])

    def parts():
        torch.autograd.grad(cross_entropy.linear_cross_entropy(x, weight, None, y), [x, weight])

    return in_turn({"whole": whole, "in parts": parts})


def step(tie: bool) -> Callable[[], object]:
    trainer, _ = build({"train.tie_unseen_tokens": tie, "runtime.device": "cpu"})
    batch = [trainer.batches[0]]
    return lambda: trainer.take_step(batch, 1e-3)


def main() -> None:
    print(f"on {device.describe(torch.device('cpu'))}; ms")
    print("head alone    rows   width    whole   in parts   ratio")
    for rows in (50_257, 11_235):
        for width in (128, 256, 384):
            t = head_alone(rows, width)
            ratio = t["whole"] / t["in parts"]
            print(f"{rows:18,} {width:7} {t['whole']:8.0f} {t['in parts']:10.0f} {ratio:7.2f}")
    t = in_turn({"every token": step(False), "tokens that occur": step(True)})
    every, occur = t.values()
    print(f"a step with a row for every token {every:.0f}, for the tokens that occur {occur:.0f}")


if __name__ == "__main__":
    main()
