"""The encoded text on its way to the token files: segments of a task, each in a file.

A segment file is complete or absent, so that a killed run continues where it was. Which segments
there are depends only on the corpus, not on the processes that encode it.
"""

import dataclasses
import json
import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from folio import files
from folio.corpus import tasks
from folio.corpus.corpus import Corpus, TextFile
from folio.corpus.statistics import CorpusStatistics
from folio.corpus.tasks import Task
from folio.tokens import tokenizer

_NAME = re.compile(r"(\d+)-(\d+)(-last)?\.npz")
_PLAN = "plan.json"


@dataclass(frozen=True)
class Plan:
    """What the processes that encode a corpus need to be the same."""

    corpus: Corpus
    column: str  # as for reading.read_documents
    tasks: list[Task]

    def save(self, folder: Path) -> None:
        files.write_text(folder / _PLAN, json.dumps(dataclasses.asdict(self)))

    @classmethod
    def load(cls, folder: Path) -> "Plan":
        found = json.loads((folder / _PLAN).read_text(encoding="utf-8"))
        found["corpus"]["files"] = tuple(TextFile(**file) for file in found["corpus"]["files"])
        found["corpus"]["left_out"] = tuple(found["corpus"]["left_out"])
        divided = [[tasks.Part(*part) for part in task] for task in found["tasks"]]
        return cls(Corpus(**found["corpus"]), found["column"], divided)


@dataclass(kw_only=True)
class Facts:
    """What is known about a segment, besides its tokens."""

    characters: int = 0
    bytes: int = 0  # in UTF-8
    tokens: int = 0
    documents: int = 0  # that end in the segment
    first_end: int | None = None  # characters up to the end of the first of these documents
    text_sha256: str = ""
    is_blank: bool = True
    without_text: int = 0  # documents
    first_without_text: list[int] | None = None  # the fields of its NoText
    statistics: dict[str, Any] = dataclasses.field(default_factory=dict)


@dataclass(frozen=True)
class Segment:
    """A segment in a file."""

    task: int
    number: int  # within the task
    path: Path

    def facts(self) -> Facts:
        with np.load(self.path) as arrays:
            return Facts(**json.loads(arrays["facts"].tobytes()))

    def statistics(self, facts: Facts) -> CorpusStatistics:
        """The statistics of the text, with all tokens counted as training tokens."""
        found = CorpusStatistics.from_json(facts.statistics, tokenizer.VOCAB_SIZE)
        found.train += self.counts()
        return found

    def counts(self) -> np.ndarray:
        """How often each id occurs, [vocabulary]."""
        with np.load(self.path) as arrays:
            return arrays["counts"]

    def ids(self) -> np.ndarray:
        with np.load(self.path) as arrays:
            return arrays["ids"]


def find(folder: Path, pattern: str = "*.npz") -> list[Segment]:
    """Return the segments in a folder, in the order of the text."""
    found = []
    for path in folder.glob(pattern):
        if match := _NAME.fullmatch(path.name):
            found.append(Segment(int(match[1]), int(match[2]), path))
    return sorted(found, key=lambda segment: (segment.task, segment.number))


def completed(folder: Path) -> set[int]:
    """Return the tasks whose segments are all in the folder."""
    found = find(folder)
    counts = Counter(segment.task for segment in found)
    last = {segment.task: segment.number for segment in found if "last" in segment.path.name}
    return {task for task, number in last.items() if counts[task] == number + 1}
