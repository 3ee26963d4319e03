"""Checks an entry of LEADERBOARD.md: measures the loss of a GPT-2 folder without Folio.

    python benchmarks/check_entry.py models/gpt2 tinyshakespeare.txt

This file needs torch, transformers and the text only, and can be copied anywhere. The text is
tinyshakespeare; its last tenth is the validation text. LEADERBOARD.md explains how to get it.
"""

import argparse
import hashlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from torch.nn import functional as F

TINYSHAKESPEARE = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"  # SHA-256 of
VALIDATION_IDS = "68a53422394c26a655ebe641f5c6f49888e8f4e45fe5d6f02abda63ba3ebd65b"  # ... as uint16
VOCABULARY = "71cca498f566a6fce90612118ffe70ec265ffdc746e7e6743a2253d346af4d30"  # sorted, as JSON
VOCAB_SIZE = 50_257
BATCH_TOKENS = 2_048  # whose logits take 0.4 GB


class EntryError(Exception):
    """What is wrong with an entry, on one line."""


def check_config(folder: Path) -> None:
    """Raise EntryError unless config.json describes a GPT-2 with GPT-2's vocabulary."""
    if not folder.is_dir():
        raise EntryError(f"{folder} is not a folder: name the one with config.json and the weights")
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        kind, size = config["model_type"], config["vocab_size"]
    except (OSError, ValueError, TypeError, KeyError):
        raise EntryError(f"{folder}/config.json is missing or is not that of a model") from None
    if kind != "gpt2":
        raise EntryError(f"{folder} contains a model of type {kind!r}, not gpt2")
    if size != VOCAB_SIZE:
        raise EntryError(f"{folder} has a vocabulary of {size} tokens, not GPT-2's {VOCAB_SIZE:,}")


def load(folder: Path) -> "transformers.GPT2LMHeadModel":  # in quotes: not yet imported
    """The model in a folder, in fp32. Raises EntryError if it is incomplete or damaged."""
    check_config(folder)
    try:
        loaded: Any = transformers.GPT2LMHeadModel.from_pretrained(
            folder,
            local_files_only=True,
            use_safetensors=True,
            dtype=torch.float32,
            output_loading_info=True,
        )
    except Exception as problem:  # whatever transformers, safetensors and torch can raise
        raise EntryError(f"transformers cannot open {folder}: {line(problem)}") from None
    model, info = loaded
    # transformers replaces missing weights by random ones; the head shares those of the embedding.
    if missing := sorted(set(info["missing_keys"]) - {"lm_head.weight"}):
        raise EntryError(
            f"{folder} is incomplete: {len(missing)} weights are missing: {missing[0]}"
        )
    if not all(torch.isfinite(weight).all() for weight in model.state_dict().values()):
        raise EntryError(f"{folder} has weights that are not finite")
    return model.to("cuda" if torch.cuda.is_available() else "cpu").eval()


def read_validation(path: Path, whole: bool) -> tuple[str, bool]:
    """The validation text, and whether it is that of tinyshakespeare.

    whole: the file is the validation text itself, and not to be cut.
    """
    try:
        text = path.read_bytes().decode("utf-8")
    except OSError as error:
        raise EntryError(f"{path} cannot be read: {error.strerror}") from None
    except UnicodeDecodeError:
        raise EntryError(f"{path} is not a text file in UTF-8") from None
    is_tiny = hashlib.sha256(text.encode()).hexdigest() == TINYSHAKESPEARE
    return (text if whole else text[int(0.9 * len(text)) :]), is_tiny and not whole


def encode(text: str, folder: Path, is_tiny: bool) -> torch.Tensor:
    """The tokens of the text, [N] int64. Raises EntryError if the tokenizer is not GPT-2's."""
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)
        vocabulary = json.dumps(sorted(tokenizer.get_vocab().items())).encode()
        ids = tokenizer(text, verbose=False)["input_ids"]
    except Exception as problem:
        raise EntryError(
            f"transformers cannot open the tokenizer in {folder}: {line(problem)}"
        ) from None
    is_gpt2 = hashlib.sha256(vocabulary).hexdigest() == VOCABULARY
    if is_gpt2 and is_tiny:
        is_gpt2 = hashlib.sha256(np.array(ids, np.uint16).tobytes()).hexdigest() == VALIDATION_IDS
    if not is_gpt2:
        raise EntryError(f"the tokenizer in {folder} is not GPT-2's")
    if len(ids) < 2:
        raise EntryError(f"the validation text is too short: it has {len(ids)} tokens")
    return torch.tensor(ids)


def line(problem: Exception) -> str:
    """The first line of an error message."""
    return (str(problem).strip() or repr(problem)).splitlines()[0]


def windows(n: int, context: int, stride: int) -> Iterator[tuple[int, int, int]]:
    """Yield (start, end, first scored) of windows that together predict tokens 1 to n - 1."""
    scored = 0  # the last token with a loss
    for start in range(0, n - 1, stride):
        end = min(start + context, n - 1)
        yield start, end, scored + 1
        scored = end
        if end == n - 1:
            return


@torch.inference_mode()
def total_loss(model: "transformers.GPT2LMHeadModel", ids: torch.Tensor, stride: int) -> float:
    """The sum of the losses of all tokens but the first, in nats. Each is scored once: in the first
    window that contains it, with the tokens before it in that window as its context."""
    context, total = model.config.n_positions, 0.0
    for batch in batches(list(windows(len(ids), context, stride)), context):
        x = torch.stack([ids[start:end] for start, end, _ in batch])
        y = torch.stack([ids[start + 1 : end + 1] for start, end, _ in batch])
        logits = model(x.to(model.device)).logits
        losses = F.cross_entropy(
            logits.flatten(0, 1), y.flatten().to(model.device), reduction="none"
        )
        for (start, _, first), row in zip(batch, losses.view_as(y).double(), strict=True):
            total += float(row[first - 1 - start :].sum())
    return total


def batches(
    found: list[tuple[int, int, int]], context: int
) -> Iterator[list[tuple[int, int, int]]]:
    """Yield the windows in batches of equal length: only the last window may be shorter."""
    full = [window for window in found if window[1] - window[0] == context]
    size = max(1, BATCH_TOKENS // context)
    for at in range(0, len(full), size):
        yield full[at : at + size]
    if len(full) < len(found):
        yield found[-1:]


def check(folder: Path, text: Path, stride: int | None, whole: bool) -> str:
    """The report on an entry. Raises EntryError."""
    validation, is_tiny = read_validation(text, whole)
    model = load(folder)
    ids = encode(validation, folder, is_tiny)
    context = model.config.n_positions
    stride = max(1, context // 2) if stride is None else stride
    if not 1 <= stride <= context:
        raise EntryError(f"--stride {stride} is not between 1 and the context of {context}")
    name = (
        "tinyshakespeare's validation text" if is_tiny else f"{text}, which is no leaderboard text"
    )
    lines = [
        f"{folder}: {model.config.n_layer} layers, {model.config.n_head} heads, width"
        f" {model.config.n_embd}, context {context}, {model.num_parameters():,} parameters",
        f"{name}: {len(validation):,} characters, {len(ids):,} tokens",
        f"{'':<26} nats/token  nats/character",
    ]
    for title, step in (("separate windows", context), (f"sliding by {stride}", stride)):
        total = total_loss(model, ids, step)
        mean, per_character = total / (len(ids) - 1), total / len(validation)
        lines.append(f"{title:<26} {mean:>10.4f} {per_character:>15.4f}")
    return "\n".join(lines)


def main() -> None:
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="a GPT-2 folder, such as models/gpt2")
    parser.add_argument("text", type=Path, help="tinyshakespeare, a text file")
    parser.add_argument("--stride", type=int, help="of the sliding window; default: half a context")
    parser.add_argument(
        "--whole", action="store_true", help="the text is the validation text itself: do not cut it"
    )
    found = parser.parse_args()
    try:
        print(check(found.folder, found.text, found.stride, found.whole))
    except EntryError as problem:
        sys.exit(f"error: {problem}")


if __name__ == "__main__":
    main()
