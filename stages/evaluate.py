"""Evaluate: what models/gpt2 has learned, as figures, samples and pictures."""

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import torch

from folio import (
    device,
    files,
    huggingface,
    params,
    pictures,
    sampling,
    tokenizer,
    tokens,
    tracking,
)
from folio.errors import UserError, one_line_errors
from folio.loss import token_losses
from folio.model import GPT
from folio.runtime import RuntimeParams


@dataclass(frozen=True, kw_only=True)
class EvaluateParams:
    stride: Annotated[int, ">= 1"]  # tokens a sliding window moves on; at most model.block_size
    prompts: list[str]  # what the samples begin with
    temperatures: Annotated[list[float], ">= 0"]  # one sample a prompt and temperature; 0: greedy
    sample_tokens: Annotated[int, ">= 1"]  # tokens a sample, after its prompt
    top_k: Annotated[int | None, ">= 1"]  # sample among the k likeliest; null: among all
    top_p: Annotated[float | None, "> 0, <= 1"]  # ... among the likeliest that make up p
    seed: Annotated[int, ">= 0"]  # of the samples

    def __post_init__(self):
        if not all(self.prompts):
            raise ValueError("prompts: one is empty; take '\\n' for no prompt")


def main() -> None:
    evaluate, runtime = params.load(evaluate=EvaluateParams, runtime=RuntimeParams)
    run(evaluate, runtime, Path.cwd())


def run(p: EvaluateParams, runtime: RuntimeParams, root: Path) -> None:
    """Read root/models/gpt2 and root/data/prepared; write root/models/evaluation."""
    model = huggingface.load(root / "models/gpt2", device.resolve_device(runtime.device))
    data = tokens.read(root / "data/prepared")
    if p.stride > model.params.block_size:
        raise UserError(
            f"evaluate.stride: {p.stride} is more than the model's context;"
            f" take at most {model.params.block_size}"
        )
    if model.transformer.wte.num_embeddings < data.meta["vocabulary"]:
        raise UserError(
            "models/gpt2 has a smaller vocabulary than data/prepared: `dvc repro train` makes one"
            " that fits"
        )
    trained = read_run(root / "models/training/run.json")
    losses = token_losses(model, data.val)
    metrics = measure(model, data, losses, p.stride)
    out = root / "models/evaluation"
    files.write_text(out / "metrics.json", json.dumps(metrics, indent=2) + "\n")
    files.write_text(out / "samples.md", samples(model, p))
    targets, context = data.val[1:], model.params.block_size
    pictures.loss_by_position(losses, context, out / "loss_by_position.png")
    pictures.loss_by_rarity(losses, targets, data.train, out / "loss_by_rarity.png")
    print(report(metrics))
    track(p, runtime, root, metrics, trained)


def read_run(path: Path) -> dict[str, str]:
    """Which MLflow run trained the model. Raises UserError if the file is missing or damaged."""
    try:
        trained = json.loads(path.read_text(encoding="utf-8"))
        return {key: trained[key] for key in ("run_id", "train_key")}
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        raise UserError(f"{path} is missing or damaged: `dvc repro train` makes it") from None


def measure(model: GPT, data: tokens.Tokens, losses: np.ndarray, stride: int) -> dict[str, float]:
    """The figures, from losses [N - 1], nats a token of the held-out text in separate windows.

    Characters and bytes are those of the whole held-out text, whose first token is given.
    """
    total, bits = float(losses.sum()), 1 / math.log(2)
    sliding = token_losses(model, data.val, stride)
    same_length = data.train[-len(data.val) :]
    return {
        "val_loss": total / len(losses),
        "val_loss_per_character": total / data.meta["val_characters"],
        "val_bits_per_byte": total * bits / data.meta["val_bytes"],
        "val_perplexity": math.exp(min(total / len(losses), 700)),
        "val_loss_sliding": float(sliding.mean()),
        "train_loss": float(token_losses(model, same_length).mean()),
    }


def samples(model: GPT, p: EvaluateParams) -> str:
    """A page of samples in Markdown. Each has a generator of its own, seeded by its place."""
    page = ["# Samples\n"]
    for i, prompt in enumerate(p.prompts):
        for j, temperature in enumerate(p.temperatures):
            generator = torch.Generator().manual_seed(p.seed + i * len(p.temperatures) + j)
            ids = sampling.generate(
                model,
                tokenizer.encode(prompt).tolist(),
                p.sample_tokens,
                temperature,
                p.top_k,
                p.top_p,
                generator,
            )
            text = prompt + tokenizer.decode(ids)
            quoted = "\n".join(f"    {line}" for line in text.split("\n"))
            page.append(f"## {prompt.strip() or 'No prompt'}, temperature {temperature:g}\n")
            page.append(quoted + "\n")
    return "\n".join(page)


def report(m: dict[str, float]) -> str:
    """The figures in words."""
    return (
        f"held-out loss {m['val_loss']:.4f} nats a token"
        f" ({m['val_loss_per_character']:.4f} a character,"
        f" {m['val_bits_per_byte']:.4f} bits a byte, perplexity {m['val_perplexity']:.1f})\n"
        f"with a sliding window {m['val_loss_sliding']:.4f};"
        f" on as much of the training text {m['train_loss']:.4f},"
        f" a gap of {m['val_loss'] - m['train_loss']:.4f}"
    )


def track(
    p: EvaluateParams,
    runtime: RuntimeParams,
    root: Path,
    metrics: dict[str, float],
    trained: dict[str, str],
) -> None:
    """The headline figures on the variant's own run; all else on a nested one."""
    parent = tracking.reopen(runtime.tracking_uri, trained["run_id"])
    if parent is None:
        return
    out = root / "models/evaluation"
    metrics = {f"evaluate/{key}": value for key, value in metrics.items()}
    parent.metrics(metrics)
    parent.artifacts(out, "evaluation")
    with tracking.Run(
        runtime.tracking_uri,
        name="evaluate",
        params=params.flatten(evaluate=p),
        tags={"train_key": trained["train_key"]},
        parent=parent.id,
    ) as child:
        child.metrics(metrics)
        child.artifacts(out, "evaluation")


if __name__ == "__main__":
    with one_line_errors():
        main()
