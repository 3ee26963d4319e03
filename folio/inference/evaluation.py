"""The metrics and the samples of a trained model; the section `evaluate` of params.yaml."""

import math
from dataclasses import dataclass
from typing import Annotated

import numpy as np
import torch

from folio.gpt.model import GPT
from folio.gpt.validation import token_losses
from folio.inference import generation
from folio.tokens import tokenizer
from folio.tokens.token_files import TokenData


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


def compute_metrics(
    model: GPT, data: TokenData, losses: np.ndarray, stride: int
) -> dict[str, float]:
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


def samples_page(model: GPT, p: EvaluateParams) -> str:
    """A page of samples in Markdown. Each has a generator of its own, seeded by its place."""
    page = ["# Samples\n"]
    for i, prompt in enumerate(p.prompts):
        for j, temperature in enumerate(p.temperatures):
            generator = torch.Generator().manual_seed(p.seed + i * len(p.temperatures) + j)
            ids = generation.generate(
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


def format_report(m: dict[str, float]) -> str:
    """The figures in words."""
    return (
        f"held-out loss {m['val_loss']:.4f} nats a token"
        f" ({m['val_loss_per_character']:.4f} a character,"
        f" {m['val_bits_per_byte']:.4f} bits a byte, perplexity {m['val_perplexity']:.1f})\n"
        f"with a sliding window {m['val_loss_sliding']:.4f};"
        f" on as much of the training text {m['train_loss']:.4f},"
        f" a gap of {m['val_loss'] - m['train_loss']:.4f}"
    )
