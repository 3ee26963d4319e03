"""Prepare: the corpus becomes token files, with a report on what is in it.

Run by `dvc repro prepare`, or by hand: `python -m stages.prepare` in the project's root.
"""

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np

from folio import corpus, diagnostics, files, pictures, tokenizer, tokens
from folio.errors import one_line_errors
from folio.params import load


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
    texts = {"train": source.train, "val": source.val}
    ids = {part: tokenizer.encode(text) for part, text in texts.items()}
    tokens.write(data / "prepared", source.name, tokenizer.VOCABULARY, texts, ids)

    text = source.train + source.val
    all_ids = np.concatenate([ids["train"], ids["val"]])
    figures = diagnostics.summary(
        len(text),
        ids["train"],
        ids["val"],
        tokenizer.VOCABULARY,
        params.report_batch_size,
        params.report_block_size,
    )
    files.write_text(data / "diagnostics.json", json.dumps(figures, indent=2) + "\n")

    table = diagnostics.commonest_tokens(all_ids, tokenizer.decode)
    with files.replacing(data / "diagnostics" / "commonest_tokens.csv") as temporary:
        table.to_csv(temporary, index=False, lineterminator="\n")
    picture = diagnostics.rank_frequency(all_ids, source.name)
    pictures.save(picture, data / "diagnostics" / "rank_frequency.png")
    picture = diagnostics.lengths(text, source.name)
    pictures.save(picture, data / "diagnostics" / "lengths.png")

    print(report(params, source.name, figures, text))


def report(params: PrepareParams, name: str, figures: dict[str, int | float], text: str) -> str:
    """The figures as one would write them up, and the first 300 characters of the text."""
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
    start = "".join(c if c.isprintable() or c == "\n" else ascii(c)[1:-1] for c in text[:300])
    return "\n".join([f"Corpus: {name}", *lines, "", "The first 300 characters:", start])


def main() -> None:
    sys.stdout.reconfigure(errors="backslashreplace")  # a terminal that is not UTF-8
    (params,) = load(prepare=PrepareParams)
    run(params, Path())


if __name__ == "__main__":
    with one_line_errors():
        main()
