"""The prepare stage: encodes the corpus to token files and reports its statistics.

Run it with `dvc repro prepare`, or directly in the project's root: `python -m stages.prepare`.
"""

import functools
import json
from collections.abc import Iterator, Sequence
from pathlib import Path

from folio import files, inputs, plots, progress
from folio.corpus import (
    assembly,
    corpus,
    folder,
    overlap,
    processes,
    repeated,
    segments,
    tasks,
    work,
)
from folio.corpus import plots as corpus_plots
from folio.corpus.assembly import Encoded
from folio.corpus.corpus import Corpus
from folio.corpus.params import PrepareParams
from folio.corpus.statistics import most_common_tokens, summarize
from folio.errors import UserError, one_line_errors
from folio.params import load
from folio.run import project_root
from folio.runtime import RuntimeParams
from folio.tokens import bpe_dropout, token_files, tokenizer
from folio.tokens.token_files import Segmentations, TokenData

_MAX_NAMES = 5  # in a line of the report
_MAX_SHARED = 0.01  # of the validation text


def run(
    params: PrepareParams, root: Path, project: Path, hide_progress: bool | None = True
) -> None:
    """Write root/data/prepared, data/diagnostics.json and data/diagnostics, and print a report.

    project: the folder that contains what a killed run has encoded so far. hide_progress: see
    RuntimeParams. Raises UserError if the corpus does not exist or is not usable.
    """
    data = root / "data"
    source = corpus.find(params.corpus, root)
    same = repeated.find(source)
    plan = segments.Plan(source, params.text_column, tasks.divide(source, params.text_column))
    with work.opened(project, source, params.text_column) as place:
        processes.encode(plan, place, hide_progress)
        encoded = assembly.assemble(
            *(plan, segments.find(place)),
            *(params.validation_fraction, params.training_fraction),
        )
        if corpus.find(params.corpus, root) != source:
            raise UserError(f"{source.name} changed while it was being read: run the command again")
        statistics = encoded.statistics
        token_files.write(
            *(data / "prepared", encoded.facts, statistics.train, encoded.ids),
            segmentations(params, hide_progress),
        )

    summary = summarize(statistics, params.report_batch_size, params.report_block_size)
    if params.training_fraction < 1:
        summary["training_fraction"] = params.training_fraction
    files.write_text(data / "diagnostics.json", json.dumps(summary, indent=2) + "\n")

    table = most_common_tokens(statistics.counts, tokenizer.decode)
    with files.replacing(data / "diagnostics/most_common_tokens.csv") as temporary:
        table.to_csv(temporary, index=False, lineterminator="\n")
    figure = corpus_plots.rank_frequency(statistics.counts, source.name)
    plots.save(figure, data / "diagnostics/rank_frequency.png")
    figure = corpus_plots.length_histograms(statistics, source.name)
    plots.save(figure, data / "diagnostics/lengths.png")

    tokens = token_files.read(data / "prepared")
    shared = overlap.shared_fraction(tokens.train, tokens.val, progress.tracker(hide_progress))
    print(format_report(params, source, summary, encoded, same, shared, tokens))


def segmentations(params: PrepareParams, hide_progress: bool | None) -> Segmentations | None:
    """The additional segmentations of the training text, if there are to be any."""
    count, dropout = params.segmentations, params.bpe_dropout
    segment = functools.partial(
        bpe_dropout.segment, count=count, dropout=dropout, track=progress.tracker(hide_progress)
    )
    return Segmentations(count, dropout, segment) if count else None


def format_report(
    params: PrepareParams,
    source: Corpus,
    summary: dict[str, int | float],
    encoded: Encoded,
    same: list[list[str]],
    shared: float,
    tokens: TokenData,
) -> str:
    """Return the summary as a table, followed by remarks and the start of the text.

    `same` are the groups of files that have the same text. `shared` is the fraction of the
    validation text that also occurs in the training text. `tokens` is what was written.
    """
    batch = f"{params.report_batch_size} x {params.report_block_size} tokens"
    documents = encoded.facts["documents"]
    rows = [
        *([("Files", f"{len(source.files):,}", "")] if source.is_folder else []),
        *([("Documents", f"{documents:,}", "each ends with token 50256")] if documents else []),
        ("Characters", f"{summary['characters']:,}", ""),
        ("Tokens (GPT-2 BPE)", f"{summary['tokens']:,}", ""),
        ("Unique tokens", f"{summary['unique_tokens']:,}", f"of {summary['vocabulary']:,}"),
        ("Characters per token", f"{summary['characters_per_token']:.2f}", ""),
        ("Training tokens", f"{summary['train_tokens']:,}", _part(params, summary)),
        *([_segmentations_row(tokens)] if tokens.segmented else []),
        (
            "Validation tokens",
            f"{summary['val_tokens']:,}",
            f"{summary['unseen_val_share']:.2%} of them do not occur in training",
        ),
        *([("", "", _unseen(encoded, tokens))] if tokens.segmented else []),
        ("Batches per epoch", f"{summary['batches_per_epoch']:,}", f"of {batch}, whole corpus"),
    ]
    width = max(12, *(len(value) for _, value, _ in rows))
    lines = [f"  {label:<22}{value:>{width}}  {remark}".rstrip() for label, value, remark in rows]
    # Control characters in the text could change the terminal's state, so they are escaped.
    start = encoded.statistics.start
    escaped = "".join(c if c.isprintable() or c == "\n" else ascii(c)[1:-1] for c in start)
    remarks = list(_remarks(source, encoded, same, shared))
    heading = f"Corpus: {source.name}"
    return "\n".join([heading, *lines, *remarks, "", "The first 300 characters:", escaped])


def _part(params: PrepareParams, summary: dict[str, int | float]) -> str:
    if params.training_fraction == 1:
        return ""
    whole = summary["tokens"] - summary["val_tokens"]
    return f"the last {100 * params.training_fraction:g} % of {whole:,}"


def _segmentations_row(tokens: TokenData) -> tuple[str, str, str]:
    total, dropout = sum(map(len, tokens.segmented)), tokens.meta["bpe_dropout"]
    return "Segmentations", f"{len(tokens.segmented)}", f"BPE dropout {dropout:g}: {total:,} tokens"


def _unseen(encoded: Encoded, tokens: TokenData) -> str:
    counts = encoded.statistics.val
    share = counts[tokens.trained_counts == 0].sum() / counts.sum()
    return f"{share:.2%} of them in no segmentation either"


def _remarks(
    source: Corpus, encoded: Encoded, same: list[list[str]], shared: float
) -> Iterator[str]:
    """Yield a line on what is left out, and warnings about content that may be unintended."""
    statistics = encoded.statistics
    if source.files and not source.is_folder and folder.is_data(source.name):
        yield (
            f"Warning: {source.name} was read as running text: if it contains documents, convert it"
            " to .jsonl or .parquet"
        )
    if source.left_out:
        yield f"Left out: {_first(source.left_out)}"
    if encoded.without_text:
        yield (
            f"Left out: {encoded.without_text:,} documents without text; the first is"
            f" {encoded.first_without_text}"
        )
    if statistics.end_of_text:
        yield (
            f"Warning: {tokenizer.END_OF_TEXT} occurs {statistics.end_of_text:,} times. It is plain"
            " text of seven tokens, not GPT-2's end-of-text token (docs/own-text.md)"
        )
    if statistics.nul_characters:
        yield (
            f"Warning: the text contains {statistics.nul_characters:,} NUL characters. If it is"
            " UTF-16, convert it to UTF-8"
        )
    for names in same[:_MAX_NAMES]:
        yield f"Warning: the same text is in {_first(names)}: remove all but one of them"
    if len(same) > _MAX_NAMES:
        yield f"Warning: ... and in {len(same) - _MAX_NAMES} more groups of files"
    if shared > _MAX_SHARED:
        yield (
            f"Warning: {shared:.1%} of the validation text also occurs in the training text, in"
            f" passages of at least {overlap.PASSAGE} tokens: the validation loss will be too low"
        )


def _first(names: Sequence[str]) -> str:
    more = f" and {len(names) - _MAX_NAMES} more" if len(names) > _MAX_NAMES else ""
    return ", ".join(names[:_MAX_NAMES]) + more


def main() -> None:
    """Run the stage in the current folder, with the settings in params.yaml."""
    # train needs a valid `runtime`, and DVC would remove the model before train reports a problem.
    params, runtime = load(prepare=PrepareParams, runtime=RuntimeParams)
    inputs.check(strict=True)  # the sources have been imported
    run(params, Path(), project_root(), runtime.hide_progress)
    inputs.check(strict=True)


if __name__ == "__main__":
    with one_line_errors():
        main()
    inputs.exit_after_check()
