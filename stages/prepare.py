"""Prepare: the corpus becomes token files, with a report on what is in it.

Run by `dvc repro prepare`, or by hand: `python -m stages.prepare` in the project's root.
"""

import json
import sys
from collections.abc import Iterator
from pathlib import Path

from folio import files, plots
from folio.corpus import corpus, statistics
from folio.corpus import plots as corpus_plots
from folio.corpus.encoding import Ids, Texts, encoded
from folio.corpus.params import PrepareParams
from folio.errors import one_line_errors
from folio.params import load
from folio.tokens import token_files, tokenizer


def run(params: PrepareParams, root: Path) -> None:
    """Write root/data/prepared, data/diagnostics.json and data/diagnostics, and print the report.

    Raises UserError when the corpus will not do.
    """
    data = root / "data"
    source = corpus.read(params.corpus, params.validation_fraction, root)
    tally = statistics.CorpusStatistics(tokenizer.VOCAB_SIZE)

    def counted() -> Iterator[tuple[Texts, Ids]]:
        for texts, ids in encoded(source):
            tally.add(texts["train"] + texts["val"], **ids)
            yield texts, ids

    token_files.write(data / "prepared", source.name, tokenizer.VOCAB_SIZE, counted())

    figures = statistics.summary(tally, params.report_batch_size, params.report_block_size)
    files.write_text(data / "diagnostics.json", json.dumps(figures, indent=2) + "\n")

    counts = tally.train + tally.val
    table = statistics.most_common_tokens(counts, tokenizer.decode)
    with files.replacing(data / "diagnostics" / "commonest_tokens.csv") as temporary:
        table.to_csv(temporary, index=False, lineterminator="\n")
    picture = corpus_plots.rank_frequency(counts, source.name)
    plots.save(picture, data / "diagnostics" / "rank_frequency.png")
    picture = corpus_plots.lengths(tally, source.name)
    plots.save(picture, data / "diagnostics" / "lengths.png")

    print(report(params, source.name, figures, tally.start))


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
