"""Divides the encoded text into training and validation, and adds up what is known about it."""

import functools
import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from folio.corpus import encoding, reading, subset
from folio.corpus.corpus import NAMED
from folio.corpus.encoding import Half
from folio.corpus.segments import Facts, Plan, Segment
from folio.corpus.statistics import CorpusStatistics
from folio.corpus.tasks import NoText
from folio.errors import UserError
from folio.tokens import tokenizer


@dataclass(frozen=True)
class Encoded:
    """A whole corpus: what token_files.write needs, and what the report shows."""

    facts: dict[str, Any]  # token_meta.FACTS
    ids: dict[str, Iterable[np.ndarray]]  # of "train" and "val", in pieces
    statistics: CorpusStatistics
    without_text: int  # documents that were left out
    first_without_text: str  # the place of the first of them


def assemble(
    plan: Plan, found: list[Segment], validation_fraction: float, training_fraction: float = 1.0
) -> Encoded:
    """Divide the segments of a corpus, which are all of its text.

    The last `validation_fraction` of the characters are for validation: exactly so many of a
    running text. Of documents, the fewest whole ones at the end that have at least so many. The
    named corpora ignore `validation_fraction`: they are all validated on the last tenth of
    tinyshakespeare, so that their losses are comparable.

    Of the text before that, the last `training_fraction` of the tokens are for training. The
    text_sha256 in the facts and the number of documents are those of the whole text.

    Reads the statistics of all segments, and again the text of the one that is divided. Raises
    UserError if no text is left for one of the two parts.
    """
    statistics = CorpusStatistics(tokenizer.VOCAB_SIZE)
    facts = []
    for segment in found:
        each = segment.facts()
        statistics.merge(segment.statistics(each))
        each.statistics = {}  # those of many segments would fill the memory
        facts.append(each)
    index, halves = _divide(plan, found, facts, validation_fraction)
    after = index + (halves is not None)  # the first segment that is only for validation
    train, val = (found[:index], found[after:])
    parts = {"train": facts[:index], "val": facts[after:]}
    half = dict(zip(parts, halves, strict=True)) if halves else {}
    for segment in val:
        statistics.val += segment.counts()
    statistics.train -= statistics.val
    if half:  # a word that is divided has other tokens
        statistics.train -= found[index].counts()
        statistics.train += half["train"].counts()
        statistics.val += half["val"].counts()
    sizes = {
        part: {
            unit: sum(getattr(each, unit) for each in [*of_part, *half_of(half, part)])
            for unit in ("tokens", "characters", "bytes")
        }
        for part, of_part in parts.items()
    }
    read_train = functools.partial(_ids, train, after=half.get("train"))
    train_ids = read_train()
    if training_fraction < 1:
        unused, train_ids = subset.end_of(read_train, statistics.train, training_fraction)
        statistics.unused, statistics.train = unused, statistics.train - unused
        sizes["train"] = subset.text_size(statistics.train)
    hashes = [each.text_sha256 for each in facts]
    joined = hashlib.sha256("".join(hashes).encode()).hexdigest()
    missing = [each.first_without_text for each in facts if each.first_without_text]
    return Encoded(
        facts={
            "corpus": plan.corpus.name,
            "vocabulary": tokenizer.VOCAB_SIZE,
            "documents": sum(each.documents for each in facts),
            "text_sha256": hashes[0] if len(hashes) == 1 else joined,
        }
        | {f"{part}_{unit}": size for part, units in sizes.items() for unit, size in units.items()},
        ids={"train": train_ids, "val": _ids(val, before=half.get("val"))},
        statistics=statistics,
        without_text=sum(each.without_text for each in facts),
        first_without_text=_place(plan, missing[0]) if missing else "",
    )


def half_of(half: dict[str, Half], part: str) -> list[Half]:
    return [half[part]] if half else []


def _divide(
    plan: Plan, found: list[Segment], facts: list[Facts], fraction: float
) -> tuple[int, tuple[Half, Half] | None]:
    """Return the index of the segment where validation begins and, if it begins within it, its two
    halves."""
    characters, name = sum(each.characters for each in facts), plan.corpus.name
    if all(each.is_blank for each in facts):
        raise UserError(f"{name} contains no text: add some, or choose another prepare.corpus")
    target = int(characters * (1 - fraction)) if plan.corpus.files else NAMED[name]()[1]
    start, place = 0, None  # characters before a segment; (index, characters within it)
    for index, each in enumerate(facts):
        if plan.corpus.has_documents:
            if each.first_end is not None and start + each.first_end <= target:
                place, start_of_place = (index, 0), start
        elif start < target <= start + each.characters:
            place = index, target - start
        start += each.characters
    if place and plan.corpus.has_documents:
        index, _ = place
        place = index, encoding.last_end(plan, found[index], target - start_of_place)
    in_train = sum(each.characters for each in facts[: place[0]]) + place[1] if place else 0
    if in_train in (0, characters):
        documents = sum(each.documents for each in facts)
        has = f"{documents} documents with {characters}" if documents else str(characters)
        part = "validation" if in_train else "training"
        raise UserError(
            f"{name} has {has} characters, so prepare.validation_fraction {fraction} leaves none"
            f" for {part}: change it, or use a longer text"
        )
    assert place
    index, within = place
    if within == facts[index].characters:
        return index + 1, None
    return index, encoding.split(plan, found[index], within)


def _ids(
    found: list[Segment], before: Half | None = None, after: Half | None = None
) -> Iterator[np.ndarray]:
    if before:
        yield before.ids()
    for segment in found:
        yield segment.ids()
    if after:
        yield after.ids()


def _place(plan: Plan, document: list[int]) -> str:
    missing = NoText(*document)
    file = plan.corpus.files[missing.file]
    if not missing.number:
        return file.name
    return reading.place_of(file, missing.number, missing.start)
