"""What general compressors make of the validation text: an upper bound on its entropy.

    python -m benchmarks.compressors

Compresses the validation text of tinyshakespeare by itself, and after a training text: the size of
both together minus that of the training text. The result is a loss, in the units that evaluate
prints, because a model's loss is the size to which arithmetic coding would compress the text with
it (Shannon 1948). Unlike a model in evaluate, a compressor continues to learn from the text that it
compresses. If there is a model in models/, its losses are printed, too.
"""

import bz2
import json
import lzma
import math
from collections.abc import Callable
from pathlib import Path

import pyppmd

from folio.corpus import shakespeare
from folio.errors import one_line_errors
from folio.tokens import tokenizer

METRICS = Path("models/evaluation/metrics.json")
_BLOCK = 890_000  # bytes that fit in one block of bzip2, which compresses each by itself
ROW = "{:<38} {:>10} {:>10} {:>10} {:>10}"


def lzma_raw(data: bytes) -> bytes:
    """LZMA2 without a container, with a dictionary that is larger than all the texts."""
    options = {"id": lzma.FILTER_LZMA2, "preset": 9 | lzma.PRESET_EXTREME, "dict_size": 1 << 26}
    return lzma.compress(data, lzma.FORMAT_RAW, filters=[options | {"lc": 4, "pb": 0}])


def bzip2(data: bytes) -> bytes:
    return bz2.compress(data, 9)


def ppmd(order: int) -> Callable[[bytes], bytes]:
    """PPMd variant I: predictions by the preceding characters, at most `order` of them, blended by
    escape probabilities (Cleary and Witten 1984; Shkarin 2002)."""

    def compress(data: bytes) -> bytes:
        encoder = pyppmd.Ppmd8Encoder(max_order=order, mem_size=1 << 28)
        return encoder.encode(data) + encoder.flush()

    return compress


COMPRESSORS: dict[str, Callable[[bytes], bytes]] = {"bzip2 -9": bzip2, "lzma -9e": lzma_raw}
COMPRESSORS |= {f"PPMd, order {order}": ppmd(order) for order in (4, 5, 6, 8)}


def nats(compress: Callable[[bytes], bytes], before: bytes, text: bytes) -> float:
    """The information in a text after another one, in nats."""
    before = before[-(_BLOCK - len(text)) :] if compress is bzip2 else before
    added = len(compress(before + text)) - (len(compress(before)) if before else 0)
    return 8 * added * math.log(2)


def row(name: str, total: float, characters: int, tokens: int) -> str:
    per = (total / characters / math.log(2), total / characters, total / tokens)
    return ROW.format(name, *(f"{value:.3f}" for value in per), f"{math.exp(per[2]):.0f}")


def main() -> None:
    plays = shakespeare.read_plays()
    tiny, others = (
        build(plays) for build in (shakespeare.build_tinyshakespeare, shakespeare.build_other_plays)
    )
    _, start = shakespeare.load_tinyshakespeare()
    text = tiny[start:]
    characters, tokens = len(text), len(tokenizer.encode(text))
    print(f"validation text: {characters:,} characters, {tokens:,} tokens of GPT-2")
    befores = {
        "by itself": "",
        "after tinyshakespeare's training text": tiny[:start],
        "after all the other plays, too": others + tiny[:start],
    }
    for title, before in befores.items():
        print()
        print(ROW.format(title, "bits/char", "nats/char", "nats/token", "perplexity"))
        for name, compress in COMPRESSORS.items():
            total = nats(compress, before.encode(), text.encode())
            print(row(f"  {name}", total, characters, tokens), flush=True)
    if METRICS.exists():
        metrics = json.loads(METRICS.read_text(encoding="utf-8"))
        print()
        print(ROW.format("models/gpt2", "bits/char", "nats/char", "nats/token", "perplexity"))
        for name, key in (("separate windows", "val_loss"), ("sliding", "val_loss_sliding")):
            print(row(f"  {name}", metrics[key] * (tokens - 1), characters, tokens - 1))


if __name__ == "__main__":
    with one_line_errors():
        main()
