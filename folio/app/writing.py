"""Text generation for the page: input checks, streaming of tokens, and progress."""

import dataclasses
import random
import re
import time
from collections.abc import Iterator

import torch

from folio.app.models import OpenModel
from folio.errors import UserError
from folio.inference import generation
from folio.inference.prompt import encode_prompt
from folio.tokens import tokenizer

MAX_PROMPT = 2_000  # characters
MAX_TOKENS = 1_000
MAX_SEED = 2**63 - 1


@dataclasses.dataclass
class Text:
    """A text during and after its generation."""

    source: OpenModel
    ids: list[int]  # the prompt's, then the generated ones
    prompt_tokens: int
    wanted: int  # tokens to generate
    seed: int
    started: float = dataclasses.field(default_factory=time.perf_counter)
    seconds: float = 0.0  # from the start to the newest token
    stopped: bool = False

    @property
    def content(self) -> str:
        return tokenizer.decode(self.ids)


def start(source: OpenModel, prompt: str, length: float | None, seed: str) -> Text:
    """A text that so far consists only of the prompt. Raises UserError for invalid input."""
    if len(prompt) > MAX_PROMPT:
        raise UserError(f"the prompt has more than {MAX_PROMPT:,} characters: shorten it")
    if length not in range(1, MAX_TOKENS + 1):
        given = "empty" if length is None else f"{length:.15g}"
        raise UserError(f"the length is {given}: enter a whole number from 1 to {MAX_TOKENS:,}")
    ids = encode_prompt(source.model, prompt or "\n")
    return Text(source, ids, len(ids), int(length or 0), _parse_seed(seed))


def generate(text: Text, temperature: float, top_k: float, top_p: float) -> Iterator[str]:
    """Yield the content after each token that completes a character, and extend `text.ids`.

    Every token is allowed if top_k is 0 and top_p is 1.
    """
    content = text.content
    ids = generation.generate(
        text.source.generating,
        list(text.ids),
        text.wanted,
        round(temperature, 2),
        int(top_k) or None,
        None if top_p == 1 else round(top_p, 2),
        torch.Generator().manual_seed(text.seed),
    )
    for piece in tokenizer.decode_stream(_collect(ids, text)):
        content += piece
        yield content


def progress(text: Text) -> str:
    """One line with the number of tokens so far, the speed and the seed."""
    done = len(text.ids) - text.prompt_tokens
    wanted = f"{text.wanted:,} token{'' if text.wanted == 1 else 's'}"
    parts = [wanted if done == text.wanted else f"{done:,} of {wanted}"]
    if done and text.seconds:
        parts.append(f"{done / text.seconds:,.0f} tokens/s")
    parts.append(f"seed {text.seed}")
    given, context = text.prompt_tokens, text.source.model.params.block_size
    if given > context:
        parts.append(f"the model sees only the last {context:,} of the prompt's {given:,} tokens")
    return ("Stopped: " if text.stopped else "") + ", ".join(parts)


def _parse_seed(seed: str) -> int:
    """Parse a seed; if it is empty, pick one at random. Raises UserError if it is invalid."""
    seed = seed.strip()
    if not seed:
        return random.randrange(10_000)
    if re.fullmatch(r"\d{1,19}", seed) and int(seed) <= MAX_SEED:
        return int(seed)
    shown = seed if len(seed) <= 24 else f"{seed[:24]}..."
    raise UserError(
        f"the seed is {shown!r}: enter a whole number from 0 to {MAX_SEED:,}, or leave it empty"
    )


def _collect(ids: Iterator[int], text: Text) -> Iterator[int]:
    for token in ids:
        text.ids.append(token)
        text.seconds = time.perf_counter() - text.started
        yield token
