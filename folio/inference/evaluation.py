"""The metrics and samples of a trained model; the section `evaluate` of params.yaml.

To add a metric, add a key to the result of `compute_metrics`: metrics.json, `dvc metrics` and the
MLflow run take every key from there.
"""

import itertools
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
    stride: Annotated[int, ">= 1"]  # tokens that a sliding window moves; at most model.block_size
    prompts: list[str]  # the beginnings of the samples
    temperatures: Annotated[list[float], ">= 0"]  # one sample per prompt and temperature; 0: greedy
    sample_tokens: Annotated[int, ">= 1"]  # tokens per sample, without the prompt
    top_k: Annotated[int | None, ">= 1"]  # sample from the k most likely tokens; null: from all
    top_p: Annotated[float | None, "> 0, <= 1"]  # ... from the most likely ones that sum to p
    seed: Annotated[int, ">= 0"]  # of the samples

    def __post_init__(self) -> None:
        if not all(self.prompts):
            raise ValueError("prompts: one is empty; use '\\n' for no prompt")


def compute_metrics(
    model: GPT, data: TokenData, losses: np.ndarray, stride: int
) -> dict[str, float]:
    """The metrics of a model, by name; losses are in nats/token unless the name says otherwise.

    losses [N - 1] are token_losses of the N tokens of data.val, in windows that do not overlap. The
    losses per character and per byte divide by the length of the whole validation text, including
    its first token, which has no loss. train_loss is of the last N tokens of the training text.
    """
    total, mean = float(losses.sum()), float(losses.sum()) / len(losses)
    sliding = token_losses(model, data.val, stride)
    end_of_train = data.train[-len(data.val) :]
    return {
        "val_loss": mean,
        "val_loss_per_character": total / data.meta["val_characters"],
        "val_bits_per_byte": total * (1 / math.log(2)) / data.meta["val_bytes"],
        "val_perplexity": math.exp(min(mean, 700)),
        "val_loss_sliding": float(sliding.mean()),
        "train_loss": float(token_losses(model, end_of_train).mean()),
    }


def samples_page(model: GPT, p: EvaluateParams) -> str:
    """A Markdown page with one sample per prompt and temperature.

    Every sample has its own generator, whose seed is p.seed plus the number of the sample, so that
    a change of one sample's length leaves the others the same.
    """
    page = ["# Samples\n"]
    samples = itertools.product(p.prompts, p.temperatures)
    for number, (prompt, temperature) in enumerate(samples):
        generator = torch.Generator().manual_seed(p.seed + number)
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
        indented = "\n".join(f"    {line}" for line in text.split("\n"))
        page.append(f"## {prompt.strip() or 'No prompt'}, temperature {temperature:g}\n")
        page.append(indented + "\n")
    return "\n".join(page)


def format_report(m: dict[str, float]) -> str:
    """The metrics as two lines of text."""
    return (
        f"validation loss {m['val_loss']:.4f} nats/token"
        f" ({m['val_loss_per_character']:.4f} nats/character,"
        f" {m['val_bits_per_byte']:.4f} bits/byte, perplexity {m['val_perplexity']:.1f}),"
        f" {m['val_loss_sliding']:.4f} with a sliding window\n"
        f"training loss {m['train_loss']:.4f} on as many tokens,"
        f" a gap of {m['val_loss'] - m['train_loss']:.4f}"
    )
