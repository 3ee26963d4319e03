"""Compares the loss curves of Folio's training step and a plain one.

    python -m benchmarks.curve --variant gpt2-124m --steps 200

The plain step uses bf16 autocast and PyTorch's own cross-entropy. Both start from the same weights
and see the same batches. A third curve shows the effect of rounding: the plain step with the
windows of each batch in reverse order, which only changes the order of summation. --fp8-head adds
Folio's step with train.fp8_head. Requires data/prepared (`dvc repro prepare`).
"""

import argparse

import torch
from torch.nn import functional as F

from benchmarks.recipe import build
from folio import device
from folio.errors import one_line_errors
from folio.sweeps import variants
from folio.training.trainer import Trainer

# What a plain step does not have.
PLAIN = {
    "model.dropout": 0.0,
    "train.unseen_probability": 0.0,
    "train.distill_from": "none",
    "train.input_noise": 0.0,
    "train.optimizer": "adamw",
    "train.factored_embedding": False,
}


def folio_losses(trainer: Trainer, steps: int) -> list[float]:
    """Train with Folio's step. Returns the loss of each step."""
    losses = []
    for step in range(steps):
        trainer.step(trainer.batches(step), trainer.learning_rate(step))
        metrics = trainer.read()
        trainer.log(metrics)
        losses.append(metrics["train_loss"])
    return losses


def plain_losses(trainer: Trainer, steps: int, reverse: bool) -> list[float]:
    """Train with a plain step. Returns the loss of each step.

    reverse: take the windows of each batch in reverse order.
    """
    model, optimizer, p, losses = trainer.model, trainer.optimizer, trainer.params, []
    for step in range(steps):
        parts = []
        for batch in trainer.batches(step):
            x, y = (t.to(trainer.device) for t in batch)
            if reverse:
                x, y = x.flip(0), y.flip(0)
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
            group["lr"] = trainer.learning_rate(step)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(torch.stack(parts).mean().item())
    return losses


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--variant", help="one of the files in variants/, without .yaml")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--compile", default="always", choices=("always", "never"))
    parser.add_argument("--fp8-head", action="store_true", help="also Folio with an fp8 head")
    options = parser.parse_args()
    variant = variants.read(options.variant) if options.variant else {}
    variant |= PLAIN | {"train.precision": "bf16", "train.compile": options.compile}
    curves = {}
    # The one that this machine might not support comes first.
    names = [*(["Folio, fp8 head"] if options.fp8_head else []), "Folio"]
    for name in (*names, "autocast", "autocast, reversed batches"):
        trainer, _ = build(variant | {"train.fp8_head": name == "Folio, fp8 head"})
        curves[name] = (
            folio_losses(trainer, options.steps)
            if name in names
            else plain_losses(trainer, options.steps, reverse=name != "autocast")
        )
        where = trainer.device
    print(f"{options.variant or 'params.yaml'} on {device.describe(where)}; loss in nats/token")
    print(f"step{'':4}", *(f"{name:>30}" for name in curves))
    interval = max(1, options.steps // 10)
    for step in range(interval, options.steps + 1, interval):
        print(f"{step:<8}", *(f"{losses[step - 1]:30.4f}" for losses in curves.values()))
    expected = torch.tensor(curves["autocast"])
    for name, losses in curves.items():
        difference = (torch.tensor(losses) - expected).abs()
        last = torch.tensor(losses)[-20:].mean()
        print(
            f"{name:<30} difference from autocast: mean {difference.mean():.4f}, maximum"
            f" {difference.max():.4f}; mean of the last 20 losses {last:.4f}"
        )


if __name__ == "__main__":
    with one_line_errors():
        main()
