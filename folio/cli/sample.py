"""Text from a model, written to the terminal as it comes."""

import itertools
import secrets
import sys
import time

import torch

from folio import device
from folio.errors import UserError
from folio.gpt.model import GPT
from folio.inference import generation
from folio.tokens import tokenizer
from folio.tracking.model_loader import load_model


def write(
    prompt: str,
    name: str,
    address: str | None,
    tokens: int,
    temperature: float,
    top_k: int | None,
    top_p: float,
    seed: int | None,
    where: str,
) -> None:
    """Print the prompt and what follows it, then on stderr the seed and the tokens a second."""
    if not prompt:
        raise UserError("the prompt is empty: take $'\\n', a line's end, for none")
    model = load_model(name, address, device.resolve_device(where))
    prompt_ids = encode(model, prompt)
    seed = secrets.randbelow(1 << 32) if seed is None else seed
    generator = torch.Generator().manual_seed(seed)
    ids = generation.generate(
        model,
        prompt_ids,
        tokens,
        temperature,
        top_k,
        None if top_p == 1 else top_p,
        generator,
    )
    sys.stdout.reconfigure(errors="replace")  # a terminal that has not all characters
    started = time.perf_counter()
    for text in itertools.chain([prompt], tokenizer.decode_stream(ids)):
        print(_harmless(text) if sys.stdout.isatty() else text, end="", flush=True)
    speed = tokens / (time.perf_counter() - started)
    print(flush=True)
    print(f"seed {seed}, {speed:,.0f} tokens/s", file=sys.stderr)


def encode(model: GPT, prompt: str) -> list[int]:
    """The ids of a prompt. Raises UserError where the model has not all of them."""
    ids, rows = tokenizer.encode(prompt).tolist(), model.transformer.wte.num_embeddings
    if max(ids) >= rows:
        raise UserError(
            f"this model has {rows:,} tokens, and the prompt others: its tokenizer is not GPT-2's"
        )
    return ids


def _harmless(text: str) -> str:
    """Without what a terminal would obey."""
    return "".join(c if c.isprintable() or c in "\n\t" else ascii(c)[1:-1] for c in text)
