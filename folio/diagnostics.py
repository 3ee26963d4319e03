"""What is in the corpus: counts, the commonest tokens, and two pictures."""

import re
from collections.abc import Callable

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from folio import pictures
from folio.pictures import BLUE, GREY


def summary(
    characters: int,
    train: np.ndarray,
    val: np.ndarray,
    vocabulary: int,
    report_batch_size: int,
    report_block_size: int,
) -> dict[str, int | float]:
    """The corpus in nine figures, from its length and its two parts' token ids, [tokens] each.

    `batches_per_epoch` is how many batches of report_batch_size x report_block_size all tokens
    fill. `unseen_val_share` is the share of validation tokens, repeats counted, whose id is nowhere
    in training: a model can only guess at those.
    """
    tokens = len(train) + len(val)
    return {
        "characters": characters,
        "tokens": tokens,
        "unique_tokens": len(np.union1d(train, val)),
        "vocabulary": vocabulary,
        "characters_per_token": characters / tokens,
        "train_tokens": len(train),
        "val_tokens": len(val),
        "batches_per_epoch": tokens // (report_batch_size * report_block_size),
        "unseen_val_share": float(np.isin(val, train, invert=True).mean()),
    }


def commonest_tokens(
    ids: np.ndarray, decode: Callable[[list[int]], str], top: int = 100
) -> pd.DataFrame:
    """The `top` commonest of the token ids, [tokens]: columns rank, id, text, count, share.

    `text` is the token as Python writes a string, so that spaces and line ends show; `share` is of
    all tokens. Equal counts are ranked by id.
    """
    counts = pd.Series(np.bincount(ids)).rename_axis("id").rename("count")
    table = counts[counts > 0].sort_values(ascending=False, kind="stable").head(top).reset_index()
    table.insert(0, "rank", table.index + 1)
    table.insert(2, "text", [repr(decode([token])) for token in table["id"]])
    table["share"] = table["count"] / len(ids)
    return table


def line_lengths(text: str) -> np.ndarray:
    """Characters in each line that is not empty, [lines]."""
    return np.array([len(line) for line in text.splitlines() if line.strip()], dtype=np.int64)


def speech_lengths(text: str) -> np.ndarray:
    """Words in each speech, [speeches]; a speech is what stands between empty lines."""
    speeches = re.split(r"\n\s*\n", text)
    return np.array([len(speech.split()) for speech in speeches if speech.strip()], dtype=np.int64)


def rank_frequency(ids: np.ndarray, title: str) -> Figure:
    """How often the commonest token occurs, the second, and so on; both axes are logarithmic.

    The dashed line falls as 1/rank (Zipf's law) from where it fits the middle ranks.
    """
    counts = np.sort(np.bincount(ids))[::-1]
    counts = counts[counts > 0]
    ranks = np.arange(1, len(counts) + 1)
    middle = slice(len(counts) // 1000, max(1, len(counts) // 10))
    level = np.exp(np.mean(np.log(counts[middle] * ranks[middle])))

    figure, [axes] = pictures.blank(1, (7, 5))
    # Limits of our own: for a single token, matplotlib would find none, and say so.
    highest = 1.5 * max(counts[0], level)
    axes.set(xscale="log", yscale="log", xlim=(0.7, 1.5 * len(counts)), ylim=(0.7, highest))
    axes.plot(ranks, counts, color=BLUE, linewidth=2, label="tokens of the corpus")
    axes.plot(ranks, level / ranks, "--", color=GREY, linewidth=1, label="1 / rank (Zipf)")
    axes.set_xlabel("rank of the token")
    axes.set_ylabel("occurrences")
    axes.legend(frameon=False)
    heading = f"{_short(title)}: {len(counts):,} different tokens among {len(ids):,}"
    figure.suptitle(heading, parse_math=False)
    return figure


def lengths(text: str, title: str) -> Figure:
    """Histograms of line_lengths and speech_lengths."""
    figure, [left, right] = pictures.blank(2, (10, 4.2))
    _histogram(left, line_lengths(text), "lines", "characters in a line")
    _histogram(right, speech_lengths(text), "speeches", "words in a speech")
    figure.suptitle(f"{_short(title)}: how long lines and speeches are", parse_math=False)
    return figure


def _short(title: str) -> str:
    """The end of a title that would not fit above a picture: of a path, it says most."""
    return title if len(title) <= 40 else f"...{title[-37:]}"


def _histogram(axes: Axes, values: np.ndarray, nouns: str, label: str) -> None:
    # The longest 1 % are left out: they would squeeze the rest into a corner.
    longest = int(np.percentile(values, 99)) + 1
    axes.hist(values, bins=np.arange(0, longest + 2, max(1, longest // 60)), color=BLUE)
    median = np.median(values)
    axes.axvline(median, color="black", linewidth=1, linestyle="--", label=f"median {median:g}")
    axes.set_title(f"{len(values):,} {nouns}, the longest of {values.max():,}")
    axes.set_xlim(left=0)
    axes.set_xlabel(label)
    axes.set_ylabel(nouns)
    axes.legend(frameon=False)
