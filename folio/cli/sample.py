"""`python -m folio sample`: generate text in the terminal."""

import io
import itertools
import math
import secrets
import sys
import time
from collections.abc import Iterable
from typing import Annotated, Literal

import typer

from folio.cli.store import tracking_uri
from folio.errors import UserError

Device = Literal["auto", "cuda", "mps", "cpu"]
Precision = Literal["auto", "bf16", "fp16", "fp32"]
_MODEL_HELP = "A model folder, the name or id of an MLflow run, or models:/folio@champion."
_MAX_STDIN = 16_000_000  # bytes


def sample(
    prompt: Annotated[
        str,
        typer.Argument(
            help="The text to continue; - reads it from standard input.", show_default="a newline"
        ),
    ] = "\n",
    model: Annotated[str, typer.Option(help=_MODEL_HELP)] = "models/gpt2",
    tokens: Annotated[int, typer.Option(min=1, help="Number of tokens to generate.")] = 200,
    temperature: Annotated[
        float, typer.Option(min=0, help="Sampling temperature; 0 picks the most likely token.")
    ] = 0.8,
    top_k: Annotated[
        int | None,
        typer.Option(min=1, max=2**63 - 1, help="Sample only from the k most likely tokens."),
    ] = None,
    top_p: Annotated[
        float,
        typer.Option(
            min=0.001,
            max=1,
            help="Sample only from the most likely tokens whose probabilities add up to p.",
        ),
    ] = 0.95,
    seed: Annotated[
        int | None,
        typer.Option(
            min=0, max=2**63 - 1, help="The same seed gives the same text; random by default."
        ),
    ] = None,
    device: Annotated[
        Device, typer.Option(help="auto selects the first available of cuda, mps and cpu.")
    ] = "auto",
    precision: Annotated[
        Precision,
        typer.Option(help="auto selects bf16 on a GPU that supports it, and otherwise fp32."),
    ] = "auto",
) -> None:
    """Generate text with a model and print it token by token.

    Example: python -m folio sample $'ROMEO:\\n' --temperature 0.7

    Example: python -m folio sample "My lord" --model models:/folio@champion
    """
    import torch

    from folio.device import resolve_device
    from folio.inference.generation import generate
    from folio.inference.precision import in_precision
    from folio.inference.prompt import encode_prompt
    from folio.tokens import tokenizer
    from folio.tracking.model_loader import load_model

    if not math.isfinite(temperature):
        raise UserError(f"--temperature is {temperature}: give a number")
    text = _read_stdin() if prompt == "-" else prompt
    if not text:
        raise UserError("the prompt is empty: use $'\\n', a newline, to start without one")
    gpt = in_precision(load_model(model, tracking_uri(), resolve_device(device)), precision)
    seed = secrets.randbelow(1 << 32) if seed is None else seed
    generator = torch.Generator().manual_seed(seed)
    limit = None if top_p == 1 else top_p
    ids = generate(gpt, encode_prompt(gpt, text), tokens, temperature, top_k, limit, generator)
    started = time.perf_counter()
    _print(itertools.chain([text], tokenizer.decode_stream(ids)))
    speed = tokens / (time.perf_counter() - started)
    print(f"seed {seed}, {speed:,.0f} tokens/s", file=sys.stderr)


def _read_stdin() -> str:
    """The text of standard input. Raises UserError if it is not text, too long or closed."""
    if sys.stdin is None:
        raise UserError("standard input is closed: give the prompt as an argument")
    encoding = "utf-8" if sys.stdin.encoding == "ascii" else sys.stdin.encoding
    try:
        content = sys.stdin.buffer.read(_MAX_STDIN + 1)
        if len(content) > _MAX_STDIN:
            raise UserError(f"standard input has more than {_MAX_STDIN:,} bytes: shorten it")
        text = content.decode(encoding).removeprefix("\ufeff")
    except OSError as error:
        raise UserError(f"standard input cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise UserError(
            f"standard input is not valid {encoding} at byte {error.start}: convert it, for example"
            f" with `iconv -f latin1 -t {encoding}`"
        ) from None
    if "\0" in text:
        raise UserError("standard input contains NUL characters: convert it to UTF-8")
    return text.replace("\r\n", "\n").replace("\r", "\n")


def _print(pieces: Iterable[str]) -> None:
    """Print the pieces of a text as they are generated, then a newline."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # the terminal may not support every character
    try:
        for piece in pieces:
            print(_escape(piece) if sys.stdout.isatty() else piece, end="", flush=True)
    except UserError:
        print(flush=True)  # the error starts on a new line
        raise
    print(flush=True)


def _escape(text: str) -> str:
    """Escape control characters in the text, because a terminal would interpret them."""
    return "".join(c if c.isprintable() or c in "\n\t" else ascii(c)[1:-1] for c in text)
