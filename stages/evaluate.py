"""Evaluate: what models/gpt2 has learned, as figures, samples and pictures."""

import hashlib
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import torch

from folio import (
    checkpoint,
    device,
    files,
    huggingface,
    lock,
    params,
    pictures,
    records,
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
    run(evaluate, runtime, Path.cwd(), tracking.project_root())


def run(p: EvaluateParams, runtime: RuntimeParams, root: Path, project: Path) -> None:
    """Read root/models and root/data/prepared, write root/models/evaluation, tell MLflow."""
    device.keep_memory()
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
    trained = records.read(root / records.TRAINING / records.FILE)
    if files.sha256(root / "models/gpt2/model.safetensors") != trained.tags.get("weights_sha256"):
        raise UserError(
            "models/gpt2 is not the model that models/training tells of: `dvc checkout` brings it"
            " back, `dvc repro --force train` makes it anew"
        )
    losses = token_losses(model, data.val)
    metrics = measure(model, data, losses, p.stride)
    out = root / records.EVALUATION
    files.write_text(out / "metrics.json", json.dumps(metrics, indent=2) + "\n")
    files.write_text(out / "samples.md", samples(model, p))
    targets, context = data.val[1:], model.params.block_size
    pictures.loss_by_position(losses, context, out / "loss_by_position.png")
    pictures.loss_by_rarity(losses, targets, data.train, out / "loss_by_rarity.png")
    records.write(_record(p, trained, out), out / records.FILE)
    print(report(metrics))
    with tracking.harmless():
        store = tracking.Store(runtime.tracking_uri)
        store.complete(records.training(root))
        store.complete(records.evaluation(root))
    # The model is in DVC's hands by now: the checkpoints that it came from have done their work.
    left = project / ".checkpoints" / trained.tags["train_key"]
    if left.exists():
        with lock.idle(left) as idle:
            known = left / records.FILE
            if idle and known.exists() and records.read(known).id == trained.id:
                checkpoint.remove(left)


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


def _record(p: EvaluateParams, trained: records.Record, out: Path) -> records.Record:
    """The evaluation's identity is what it found: the same again is the same run in MLflow."""
    settings = {name: str(value) for name, value in params.flatten(evaluate=p).items()}
    found = [(out / name).read_text(encoding="utf-8") for name in ("metrics.json", "samples.md")]
    content = json.dumps([trained.id, settings, *found])
    now = records.now()
    return records.Record(
        id=hashlib.sha256(content.encode()).hexdigest()[:32],
        name="evaluate",
        started=now,
        ended=now,
        parent=trained.id,
        params=settings,
        tags=tracking.context("stages/evaluate.py") | {"train_key": trained.tags["train_key"]},
    )


if __name__ == "__main__":
    with one_line_errors():
        main()
