"""The metrics and samples of a trained model.

To add a metric, add a key to the result of `compute_metrics`, and its value to `format_report`.
Every key appears in metrics.json, in `dvc metrics` and in the MLflow run.
"""

import itertools
import math
import re

import numpy as np
import torch

from folio.gpt.model import GPT
from folio.gpt.validation import token_losses
from folio.inference import generation
from folio.inference.params import EvaluateParams
from folio.progress import Track, untracked
from folio.tokens import tokenizer
from folio.tokens.token_files import TokenData

_MAX_HEADING = 80  # characters
_MARKDOWN = re.compile(r"[\\`*_\[\]<>#&|~$]")  # characters with a meaning in a line of Markdown
# Control characters except "\t" and "\n", the separators of Unicode, and lone surrogates.
_UNPRINTABLE = re.compile("[\0-\x08\x0b-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]")


def compute_metrics(
    model: GPT,
    data: TokenData,
    losses: np.ndarray,
    p: EvaluateParams,
    track: Track = untracked,
) -> dict[str, float]:
    """The metrics of a model, by name; losses are in nats/token unless the name says otherwise.

    losses [N - 1] are the token_losses of the N tokens in data.val, in windows that do not overlap.
    The losses per character and per byte are divided by the length of the whole validation text,
    including its first token, which has no loss. train_loss is measured on the last train_tokens
    tokens of the training text: N of them, or all if p.whole_training_text is set.
    """
    total, mean = float(losses.sum()), float(losses.sum()) / len(losses)
    sliding = token_losses(model, data.val, p.stride, track, "2 of 4: sliding window")
    trained = data.train if p.whole_training_text else data.train[-len(data.val) :]
    train = token_losses(model, trained, track=track, description="3 of 4: training loss")
    return {
        "val_loss": mean,
        "val_loss_per_character": total / data.meta["val_characters"],
        "val_bits_per_byte": total * (1 / math.log(2)) / data.meta["val_bytes"],
        "val_perplexity": math.exp(min(mean, 700)),
        "val_loss_sliding": float(sliding.mean()),
        "train_loss": float(train.mean()),
        "train_tokens": len(trained),
    }


def samples_page(model: GPT, p: EvaluateParams, track: Track = untracked) -> str:
    """A Markdown page with one sample per prompt and temperature.

    Every sample has its own generator, seeded with p.seed plus the number of the sample, so that
    changing the length of one sample does not affect the others.
    """
    page = ["# Samples\n"]
    samples = list(enumerate(itertools.product(p.prompts, p.temperatures)))
    for number, (prompt, temperature) in track(samples, "4 of 4: samples"):
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
        page.append(f"## {_heading(prompt) or 'No prompt'}, temperature {temperature:g}\n")
        page.append(code_block(text) + "\n")
    return "\n".join(page)


def _heading(prompt: str) -> str:
    """The start of a prompt as one line of plain text in Markdown."""
    line = " ".join(prompt.split())
    return plain_line(line if len(line) <= _MAX_HEADING else line[: _MAX_HEADING - 3] + "...")


def plain_line(text: str) -> str:
    """A text as one line of plain text in Markdown."""
    return _MARKDOWN.sub(r"\\\g<0>", _escape(" ".join(text.split())))


def code_block(text: str) -> str:
    """A text as a code block in Markdown, whatever the text contains.

    The block is indented, because a line of the text could end a fenced block. Only line
    terminators other than the newline could end it, and they are escaped as control characters.
    """
    return "\n".join(f"    {line}" for line in _escape(text).split("\n"))


def _escape(text: str) -> str:
    """Escape control characters and all characters that some program treats as a line break."""
    return _UNPRINTABLE.sub(lambda found: ascii(found[0])[1:-1], text)


def format_report(m: dict[str, float]) -> str:
    """Format the metrics as two lines of text."""
    return (
        f"validation loss {m['val_loss']:.4f} nats/token"
        f" ({m['val_loss_per_character']:.4f} nats/character,"
        f" {m['val_bits_per_byte']:.4f} bits/byte, perplexity {m['val_perplexity']:.1f}),"
        f" {m['val_loss_sliding']:.4f} with a sliding window\n"
        f"training loss {m['train_loss']:.4f} on {m['train_tokens']:,} tokens of the training text,"
        f" a gap of {m['val_loss'] - m['train_loss']:.4f}"
    )
