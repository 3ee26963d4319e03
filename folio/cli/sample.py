"""`python -m folio sample`: generate text in the terminal."""

import io
import itertools
import secrets
import sys
import time
from collections.abc import Iterable
from typing import Annotated, Literal

import typer

from folio.cli.store import tracking_uri
from folio.errors import UserError

Device = Literal["auto", "cuda", "mps", "cpu"]
_MODEL_HELP = "A model folder, the name or id of an MLflow run, or models:/folio@champion."


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
        float, typer.Option(min=0, help="Sampling temperature; 0 takes the most likely token.")
    ] = 0.8,
    top_k: Annotated[
        int | None, typer.Option(min=1, help="Sample only from the k most likely tokens.")
    ] = None,
    top_p: Annotated[
        float,
        typer.Option(
            min=0.001, max=1, help="Sample only from the most likely tokens that add up to p."
        ),
    ] = 0.95,
    seed: Annotated[
        int | None,
        typer.Option(
            min=0, max=2**63 - 1, help="The same seed gives the same text; by default random."
        ),
    ] = None,
    device: Annotated[
        Device, typer.Option(help="auto is the first available of cuda, mps and cpu.")
    ] = "auto",
) -> None:
    """Generate text with a model and print it token by token.

    Example: python -m folio sample $'ROMEO:\\n' --temperature 0.7

    Example: python -m folio sample "My lord" --model models:/folio@champion
    """
    import torch

    from folio.device import resolve_device
    from folio.inference.generation import generate
    from folio.inference.prompt import encode_prompt
    from folio.tokens import tokenizer
    from folio.tracking.model_loader import load_model

    text = sys.stdin.read() if prompt == "-" else prompt
    if not text:
        raise UserError("the prompt is empty: use $'\\n', a newline, to start without one")
    gpt = load_model(model, tracking_uri(), resolve_device(device))
    seed = secrets.randbelow(1 << 32) if seed is None else seed
    generator = torch.Generator().manual_seed(seed)
    limit = None if top_p == 1 else top_p
    ids = generate(gpt, encode_prompt(gpt, text), tokens, temperature, top_k, limit, generator)
    started = time.perf_counter()
    _print(itertools.chain([text], tokenizer.decode_stream(ids)))
    speed = tokens / (time.perf_counter() - started)
    print(f"seed {seed}, {speed:,.0f} tokens/s", file=sys.stderr)


def _print(pieces: Iterable[str]) -> None:
    """Print the pieces of a text as they are generated, then a newline."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # the terminal may not support every character
    for piece in pieces:
        print(_escape(piece) if sys.stdout.isatty() else piece, end="", flush=True)
    print(flush=True)


def _escape(text: str) -> str:
    """The text with control characters escaped, because a terminal would interpret them."""
    return "".join(c if c.isprintable() or c in "\n\t" else ascii(c)[1:-1] for c in text)
