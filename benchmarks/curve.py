"""Does the fast step learn as the plain one does: the loss curves of both, and of rounding alone.

    python -m benchmarks.curve --variant gpt2-124m --steps 200

Folio's step beside forward and backward in bf16 autocast with PyTorch's own cross-entropy, from the
same weights, on the same batches. What rounding makes of a curve is seen in the plain way itself
with the windows of each batch in the opposite order, which changes the order of its sums alone.
Needs data/prepared (`dvc repro prepare`).
"""

import argparse
from itertools import pairwise

import torch
from torch.nn import functional as F

from benchmarks.recipe import build
from folio import device
from folio.sweeps import variants
from folio.errors import one_line_errors
from stages.train import Trainer


def folio(trainer: Trainer, steps: int) -> list[float]:
    """The loss of each step."""
    sums = [0.0]
    for _ in range(steps):
        trainer.advance()
        sums.append(trainer.take_step.read().loss)
    return [after - before for before, after in pairwise(sums)]


def plain(trainer: Trainer, steps: int, flip: bool) -> list[float]:
    model, optimizer, p, losses = trainer.model, trainer.optimizer, trainer.p, []
    for number in range(steps):
        parts = []
        for i in range(p.accumulation):
            x, y = trainer.batches[number * p.accumulation + i]
            x, y = (t.flip(0) if flip else t for t in (x.to(trainer.device), y.to(trainer.device)))
            with torch.autocast(trainer.device.type, torch.bfloat16):
                logits = F.linear(model.hidden(x), model.transformer.wte.weight).float()
                if model.log_multiplicity is not None:
                    logits = logits + model.log_multiplicity
                loss = F.cross_entropy(logits.flatten(0, 1), y.flatten())
            if model.log_multiplicity is not None:
                loss = loss + model.log_multiplicity[y].mean()
            (loss / p.accumulation).backward()
            parts.append(loss.detach())
        torch.nn.utils.clip_grad_norm_(model.parameters(), p.grad_clip)
        for group in optimizer.param_groups:
            group["lr"] = trainer.rate(number)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(torch.stack(parts).mean().item())
    return losses


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--variant", help="one of the files in variants/, without .yaml")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--compile", default="always", choices=("always", "never"))
    options = parser.parse_args()
    variant = variants.read(options.variant) if options.variant else {}
    variant |= {"model.dropout": 0.0, "train.precision": "bf16", "train.compile": options.compile}
    curves = {}
    for name in ("Folio", "autocast", "autocast, in the other order"):
        trainer, _ = build(variant)
        curves[name] = (
            folio(trainer, options.steps)
            if name == "Folio"
            else plain(trainer, options.steps, flip=name != "autocast")
        )
        where = trainer.device
    print(f"{options.variant or 'params.yaml'} on {device.describe(where)}; nats a token")
    print(f"step{'':4}", *(f"{name:>30}" for name in curves))
    for step in range(options.steps // 10, options.steps + 1, options.steps // 10):
        print(f"{step:<8}", *(f"{losses[step - 1]:30.4f}" for losses in curves.values()))
    expected = torch.tensor(curves["autocast"])
    for name, losses in curves.items():
        apart = (torch.tensor(losses) - expected).abs()
        last = torch.tensor(losses)[-20:].mean()
        print(
            f"{name:<30} from autocast: mean {apart.mean():.4f}, at most {apart.max():.4f};"
            f" mean of the last 20 {last:.4f}"
        )


if __name__ == "__main__":
    with one_line_errors():
        main()
