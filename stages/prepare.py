"""The prepare stage: encode the corpus to token files, and report its statistics.

Run it with `dvc repro prepare`, or directly in the project's root: `python -m stages.prepare`.
"""

import io
import json
import sys
from collections.abc import Iterator
from pathlib import Path

from folio import files, plots
from folio.corpus import corpus
from folio.corpus import plots as corpus_plots
from folio.corpus.encoding import SplitIds, SplitText, encode_corpus
from folio.corpus.params import PrepareParams
from folio.corpus.statistics import CorpusStatistics, most_common_tokens, summarize
from folio.errors import one_line_errors
from folio.params import load
from folio.tokens import token_files, tokenizer


def run(params: PrepareParams, root: Path) -> None:
    """Write root/data/prepared, data/diagnostics.json and data/diagnostics, and print a report.

    Raises UserError if the corpus does not exist or is not usable.
    """
    data = root / "data"
    source = corpus.read(params.corpus, params.validation_fraction, root)
    statistics = CorpusStatistics(tokenizer.VOCAB_SIZE)

    def counted_pieces() -> Iterator[tuple[SplitText, SplitIds]]:
        for text, ids in encode_corpus(source):
            statistics.add(text["train"] + text["val"], **ids)
            yield text, ids

    token_files.write(data / "prepared", source.name, tokenizer.VOCAB_SIZE, counted_pieces())

    summary = summarize(statistics, params.report_batch_size, params.report_block_size)
    files.write_text(data / "diagnostics.json", json.dumps(summary, indent=2) + "\n")

    counts = statistics.train + statistics.val
    table = most_common_tokens(counts, tokenizer.decode)
    with files.replacing(data / "diagnostics/most_common_tokens.csv") as temporary:
        table.to_csv(temporary, index=False, lineterminator="\n")
    figure = corpus_plots.rank_frequency(counts, source.name)
    plots.save(figure, data / "diagnostics/rank_frequency.png")
    figure = corpus_plots.length_histograms(statistics, source.name)
    plots.save(figure, data / "diagnostics/lengths.png")

    print(format_report(params, source.name, summary, statistics.start))


def format_report(
    params: PrepareParams, name: str, summary: dict[str, int | float], start: str
) -> str:
    """Return the summary as a table, followed by the start of the text."""
    batch = f"{params.report_batch_size} x {params.report_block_size} tokens"
    rows = [
        ("Characters", f"{summary['characters']:,}", ""),
        ("Tokens (GPT-2 BPE)", f"{summary['tokens']:,}", ""),
        ("Unique tokens", f"{summary['unique_tokens']:,}", f"of {summary['vocabulary']:,}"),
        ("Characters per token", f"{summary['characters_per_token']:.2f}", ""),
        ("Training tokens", f"{summary['train_tokens']:,}", ""),
        (
            "Validation tokens",
            f"{summary['val_tokens']:,}",
            f"{summary['unseen_val_share']:.2%} of them do not occur in training",
        ),
        ("Batches per epoch", f"{summary['batches_per_epoch']:,}", f"of {batch}, all tokens"),
    ]
    lines = [f"  {label:<22}{value:>12}  {remark}".rstrip() for label, value, remark in rows]
    # Control characters in the text could change the terminal's state, so they are escaped.
    escaped = "".join(c if c.isprintable() or c == "\n" else ascii(c)[1:-1] for c in start)
    return "\n".join([f"Corpus: {name}", *lines, "", "The first 300 characters:", escaped])


def main() -> None:
    """Run the stage with the params of params.yaml, in the current folder."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # for a terminal that is not UTF-8
    (params,) = load(prepare=PrepareParams)
    run(params, Path())


if __name__ == "__main__":
    with one_line_errors():
        main()
