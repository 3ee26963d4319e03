"""Prepare: the corpus becomes token files, with a report on what is in it.

Run by `dvc repro prepare`, or by hand: `python -m stages.prepare` in the project's root.
"""

import collections
import json
import os
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np

from folio import corpus, diagnostics, files, pictures, tokenizer, tokens
from folio.errors import one_line_errors
from folio.params import load

Texts = dict[str, str]  # a piece of the text: what is for "train" and what for "val"
Ids = dict[str, np.ndarray]  # the token ids of each, [tokens] uint16


@dataclass(frozen=True, kw_only=True)
class PrepareParams:
    corpus: str  # tinyshakespeare, shakespeare, or a file or folder of .txt files under data/raw
    validation_fraction: Annotated[float, "> 0, < 1"]  # of an own text's characters, at its end;
    # the named corpora always validate on the last tenth of tinyshakespeare
    report_batch_size: Annotated[int, ">= 1"]  # windows a batch, in the report's batches_per_epoch
    report_block_size: Annotated[int, ">= 1"]  # tokens a window, in the report's batches_per_epoch


def run(params: PrepareParams, root: Path) -> None:
    """Write root/data/prepared, data/diagnostics.json and data/diagnostics, and print the report.

    Raises UserError when the corpus will not do.
    """
    data = root / "data"
    source = corpus.read(params.corpus, params.validation_fraction, root)
    tally = diagnostics.Tally(tokenizer.VOCABULARY)

    def counted() -> Iterator[tuple[Texts, Ids]]:
        for texts, ids in encoded(source):
            tally.add(texts["train"] + texts["val"], **ids)
            yield texts, ids

    tokens.write(data / "prepared", source.name, tokenizer.VOCABULARY, counted())

    figures = diagnostics.summary(tally, params.report_batch_size, params.report_block_size)
    files.write_text(data / "diagnostics.json", json.dumps(figures, indent=2) + "\n")

    counts = tally.train + tally.val
    table = diagnostics.commonest_tokens(counts, tokenizer.decode)
    with files.replacing(data / "diagnostics" / "commonest_tokens.csv") as temporary:
        table.to_csv(temporary, index=False, lineterminator="\n")
    picture = diagnostics.rank_frequency(counts, source.name)
    pictures.save(picture, data / "diagnostics" / "rank_frequency.png")
    picture = diagnostics.lengths(tally, source.name)
    pictures.save(picture, data / "diagnostics" / "lengths.png")

    print(report(params, source.name, figures, tally.start))


def encoded(source: corpus.Corpus) -> Iterator[tuple[Texts, Ids]]:
    """The pieces of the text in their order, with their token ids, encoded on all cores.

    tiktoken lets other threads run while it encodes. A few pieces wait for their turn, so that no
    core does, and no more: a text may be larger than the memory.
    """
    cores = _cores()
    # Builds the encoding, and uses all of its pattern, before the threads do: the regex engine's
    # first user writes, at each match, to memory that all others read. Were it one of two threads,
    # the two would be no faster than one.
    tokenizer.encode("It's a text of 1 line.\n\n")
    pool = ThreadPoolExecutor(cores)
    ahead = collections.deque()
    try:
        for texts in parts(source):
            ahead.append((texts, pool.submit(_encode, texts)))
            if len(ahead) > 2 * cores:
                texts, ids = ahead.popleft()
                yield texts, ids.result()
        for texts, ids in ahead:
            yield texts, ids.result()
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


def parts(source: corpus.Corpus) -> Iterator[Texts]:
    """The pieces of the text in their order: of each, what is for training and for validation."""
    train = source.train_characters  # that are still to come
    for piece in tokenizer.pieces(source.chunks()):
        yield {"train": piece[:train], "val": piece[train:]}
        train = max(0, train - len(piece))


def _cores() -> int:
    """How many cores this process may use."""
    if hasattr(os, "sched_getaffinity"):  # Linux
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _encode(texts: Texts) -> Ids:
    return {part: tokenizer.encode(text) for part, text in texts.items()}


def report(params: PrepareParams, name: str, figures: dict[str, int | float], start: str) -> str:
    """The figures as one would write them up, and the start of the text."""
    batch = f"{params.report_batch_size} x {params.report_block_size} tokens"
    rows = [
        ("Characters", f"{figures['characters']:,}", ""),
        ("Tokens (GPT-2 BPE)", f"{figures['tokens']:,}", ""),
        ("Unique tokens", f"{figures['unique_tokens']:,}", f"of {figures['vocabulary']:,}"),
        ("Characters per token", f"{figures['characters_per_token']:.2f}", ""),
        ("Training tokens", f"{figures['train_tokens']:,}", ""),
        (
            "Validation tokens",
            f"{figures['val_tokens']:,}",
            f"{figures['unseen_val_share']:.2%} of them never seen in training",
        ),
        ("Batches per epoch", f"{figures['batches_per_epoch']:,}", f"of {batch}, all tokens"),
    ]
    lines = [f"  {label:<22}{value:>12}  {remark}".rstrip() for label, value, remark in rows]
    # A terminal obeys some characters: of the text's, it gets those that print and line ends.
    shown = "".join(c if c.isprintable() or c == "\n" else ascii(c)[1:-1] for c in start)
    return "\n".join([f"Corpus: {name}", *lines, "", "The first 300 characters:", shown])


def main() -> None:
    sys.stdout.reconfigure(errors="backslashreplace")  # a terminal that is not UTF-8
    (params,) = load(prepare=PrepareParams)
    run(params, Path())


if __name__ == "__main__":
    with one_line_errors():
        main()
