"""Divides a corpus into tasks that processes can read independently of each other.

A corpus of .txt files is one running text: the files are joined in order, with a line break after
each that does not end with one. If there is a .jsonl or .parquet file, the corpus consists of
documents: each line, each row, and each .txt file is one. The tasks depend only on the corpus, and
their texts, joined, are the whole text, divided only where tokenizer.pieces could divide it.
"""

import itertools
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

from folio.corpus import tables
from folio.corpus.corpus import NAMED, Corpus, TextFile
from folio.corpus.opening import Consumed
from folio.corpus.reading import read_documents, read_text
from folio.tokens import tokenizer

TASK = 1 << 25  # bytes of a task, except that a compressed file and a row group are not divided
_EXPANSION = 4  # how much larger than the file a compressed text is, roughly
_FIRST_CUT = re.compile(rf"(?<=\S)(?={tokenizer.BLANK})")  # where tokenizer.pieces may cut


class Part(NamedTuple):
    file: int  # index in Corpus.files
    start: int  # a byte, or a row group of a .parquet file
    end: int  # the same, exclusive; for a compressed file, its size
    weight: float  # bytes of the file


Task = list[Part]


@dataclass(frozen=True)
class Piece:
    text: str
    ends_document: bool = False  # whether a document ends here: the end-of-text token follows


@dataclass(frozen=True)
class NoText:
    """A document without text, which is left out."""

    file: int  # index in Corpus.files
    number: int  # as in reading.Document; 0 for a .txt file
    start: int


def divide(corpus: Corpus, column: str) -> list[Task]:
    """Return the tasks of a corpus, in order. A named corpus is one task without parts.

    column: as for read_documents. Reads the metadata of .parquet files; raises UserError.
    """
    tasks: list[Task] = []
    size: float = TASK
    for index, file in enumerate(corpus.files):
        for part, bytes_read in _parts(file, index, column):
            if size >= TASK:
                tasks.append([])
                size = 0
            tasks[-1].append(part)
            size += bytes_read
    return tasks or [[]]


def read(corpus: Corpus, task: Task, column: str, consumed: Consumed) -> Iterator[Piece | NoText]:
    """Yield the text of a task, in pieces that can be encoded one by one. A piece is only empty if
    it ends a document.

    column: as for read_documents. consumed: is called with the number of bytes that were read.
    """
    if not corpus.files:
        text, _ = NAMED[corpus.name]()
        yield from map(Piece, tokenizer.pieces([text]))
    elif not corpus.has_documents:
        yield from map(Piece, tokenizer.pieces(_joined(corpus, task, consumed)))
    else:
        for part in task:
            if corpus.files[part.file].kind == "txt":
                yield from _one_document(corpus, part, consumed)
            else:
                yield from _documents(corpus, part, column, consumed)


def continues(corpus: Corpus, task: Task) -> bool:
    """Whether the first text of a task continues that of the task before it."""
    if not task or corpus.files[task[0].file].kind != "txt":
        return False
    at_start = task[0].start == 0 and (corpus.has_documents or task[0].file == 0)
    return not at_start


def _parts(file: TextFile, index: int, column: str) -> Iterator[tuple[Part, float]]:
    """Yield the parts of a file, each with its size in bytes, roughly."""
    if file.kind == "parquet":
        sizes = tables.row_groups(file, column)
        total, start, size = sum(sizes) or 1, 0, 0
        for number, group in enumerate(sizes):
            size += group
            if size >= TASK or number == len(sizes) - 1:
                yield Part(index, start, number + 1, file.size * size / total), size
                start, size = number + 1, 0
    elif file.compression:
        yield Part(index, 0, file.size, file.size), file.size * _EXPANSION
    else:
        for start in range(0, max(1, file.size), TASK):
            end = min(file.size, start + TASK)
            yield Part(index, start, end, end - start), end - start


def _documents(
    corpus: Corpus, part: Part, column: str, consumed: Consumed
) -> Iterator[Piece | NoText]:
    file = corpus.files[part.file]
    for text, number, start in read_documents(file, part.start, part.end, column, consumed):
        if not text or text.isspace():
            yield NoText(part.file, number, start)
        else:
            yield Piece(text, ends_document=True)


def _one_document(corpus: Corpus, part: Part, consumed: Consumed) -> Iterator[Piece | NoText]:
    """Yield the text of a part of a .txt file that is a document."""
    at_end = part.end == corpus.files[part.file].size
    chunks = _raw(corpus, part, consumed)
    rest = iter(()) if at_end else _after(corpus, part)
    pieces = tokenizer.pieces(_between_cuts(chunks, part.start > 0, rest))
    latest, is_first = "", True
    for piece in pieces:
        if latest:
            yield Piece(latest)
            is_first = False
        latest = piece
    if at_end and part.start == 0 and is_first and (not latest or latest.isspace()):
        yield NoText(part.file, 0, 0)
    elif latest or at_end:  # the task before this one may have the text up to the end
        yield Piece(latest, at_end)


def _joined(corpus: Corpus, task: Task, consumed: Consumed) -> Iterator[str]:
    """Yield the text of a task of a running text."""
    chunks = itertools.chain.from_iterable(_raw(corpus, part, consumed) for part in task)
    return _between_cuts(chunks, continues(corpus, task), _after(corpus, task[-1]))


def _raw(corpus: Corpus, part: Part, consumed: Consumed) -> Iterator[str]:
    """Yield the text of a part of a .txt file, and the line break that separates it from the next
    file."""
    file = corpus.files[part.file]
    end = None if file.compression or part.end == file.size else part.end
    chunk = ""
    for chunk in read_text(file, part.start, end, consumed):
        yield chunk
    is_last = corpus.has_documents or part.file == len(corpus.files) - 1
    # The last part of a file has no text if its bytes belong to a character that begins before.
    if end is None and not is_last and (chunk or part.start) and chunk[-1:] != "\n":
        yield "\n"


def _after(corpus: Corpus, part: Part) -> Iterator[str]:
    """Yield the text that follows a part: the rest of its file and, in a running text, the next
    files."""
    file = corpus.files[part.file]
    if part.end < file.size and not file.compression:
        yield from _raw(corpus, Part(part.file, part.end, file.size, 0), lambda _: None)
    for index in range(part.file + 1, len(corpus.files) if not corpus.has_documents else 0):
        yield from _raw(corpus, Part(index, 0, corpus.files[index].size, 0), lambda _: None)


def _between_cuts(chunks: Iterable[str], skip: bool, rest: Iterator[str]) -> Iterator[str]:
    """Yield the chunks up to the first place in `rest` where the text may be cut.

    skip: whether to begin at the first such place in the chunks, as the task before this one ends
    there; if there is none, it continues to one in `rest`, or to the end of it.
    """
    chunks = iter(chunks)
    if skip:
        head = ""
        for chunk in chunks:
            found = _search(head, chunk)
            if found is not None:
                yield chunk[found:]
                break
            head = chunk[-1]
        else:
            following = next(rest, "")
            if _search(head, following) != 0:
                return
            rest = itertools.chain([following], rest)
    yield from chunks
    before = ""
    for chunk in rest:
        found = _search(before, chunk)
        if found is not None:
            yield chunk[:found]
            return
        yield chunk
        before = chunk[-1]


def _search(before: str, chunk: str) -> int | None:
    """The first place in a chunk where the text may be cut, given the character before it, if
    any."""
    found = _FIRST_CUT.search(before + chunk)
    return found.start() - len(before) if found else None
