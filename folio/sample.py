"""Text from a model, written to the terminal as it comes."""

import secrets
import sys
import tempfile
import time
from pathlib import Path

import torch

from folio import device, huggingface, sampling, tokenizer
from folio.errors import UserError
from folio.model import GPT


def write(
    prompt: str,
    name: str,
    address: str | None,
    tokens: int,
    temperature: float,
    top_k: int | None,
    top_p: float,
    seed: int | None,
    where: device.Device,
) -> None:
    """Print the prompt and what follows it, then on stderr the seed and the tokens a second."""
    if not prompt:
        raise UserError("the prompt is empty: take $'\\n', a line's end, for none")
    model = find(name, address, device.resolve_device(where))
    seed = secrets.randbelow(1 << 32) if seed is None else seed
    generator = torch.Generator().manual_seed(seed)
    ids = sampling.generate(
        model,
        tokenizer.encode(prompt).tolist(),
        tokens,
        temperature,
        top_k,
        None if top_p == 1 else top_p,
        generator,
    )
    started = time.perf_counter()
    print(prompt, end="", flush=True)
    for text in tokenizer.stream(ids):
        print(text, end="", flush=True)
    speed = tokens / (time.perf_counter() - started)
    print(flush=True)
    print(f"seed {seed}, {speed:,.0f} tokens/s", file=sys.stderr)


def find(name: str, address: str | None, where: torch.device) -> GPT:
    """The model of a folder, or of MLflow where no folder has the name. Raises UserError."""
    if Path(name).is_dir() or name == "models/gpt2":
        return huggingface.load(Path(name), where)
    from folio.tracking import Store  # MLflow takes two seconds to import

    with tempfile.TemporaryDirectory(prefix="folio-") as folder:
        return huggingface.load(Store.existing(address).fetch_model(name, Path(folder)), where)
