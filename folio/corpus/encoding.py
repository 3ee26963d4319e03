"""Encodes the text of a task to segments."""

import dataclasses
import hashlib
import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from folio import files
from folio.corpus import segments, tasks
from folio.corpus.opening import Consumed
from folio.corpus.segments import Facts, Plan, Segment
from folio.corpus.statistics import CorpusStatistics
from folio.corpus.tasks import NoText, Piece
from folio.tokens import tokenizer
from folio.tokens.token_files import dtype_of

SEGMENT = 2 * tasks.TASK  # characters; it ends with the piece that reaches this length
_BUFFER = 1 << 20  # characters of documents that are encoded at once
_END_OF_TEXT = np.array([tokenizer.VOCAB_SIZE - 1], dtype=dtype_of(tokenizer.VOCAB_SIZE))


def encode(plan: Plan, task: int, folder: Path, consumed: Consumed) -> None:
    """Encode a task: write the segments that the folder does not have yet.

    consumed: as for tasks.read. Raises UserError if the text is not valid.
    """
    known = {segment.number for segment in segments.find(folder, f"{task:07d}-*.npz")}
    for number, builder, is_last in _segments(plan, task, known, consumed):
        if builder:
            name = f"{task:07d}-{number:07d}{'-last' if is_last else ''}.npz"
            with files.replacing(folder / name) as temporary:
                builder.save(temporary)


def split(plan: Plan, segment: Segment, characters: int) -> tuple["Half", "Half"]:
    """Read a segment again, and return what is before and after this number of its characters.

    If there are documents, one must end there.
    """
    halves = Half(), Half()
    number, seen = 0, 0
    for piece in tasks.read(plan.corpus, plan.tasks[segment.task], plan.column, lambda _: None):
        if isinstance(piece, NoText):
            continue
        if number == segment.number:
            before = piece.text[: max(0, characters - seen)]
            after = piece.text[len(before) :]
            ends_before = piece.ends_document and not after and seen <= characters
            if before or ends_before:
                halves[0].add(Piece(before, ends_before))
            if after or (piece.ends_document and not ends_before):
                halves[1].add(Piece(after, piece.ends_document))
        seen += len(piece.text)
        if seen >= SEGMENT:
            number, seen = number + 1, 0
            if number > segment.number:
                break
    for half in halves:
        half.finish()
    return halves


def last_end(plan: Plan, segment: Segment, limit: int) -> int:
    """Return where the last document ends that ends after at most `limit` characters of a segment.

    At least one must.
    """
    number, seen, found = 0, 0, -1
    for piece in tasks.read(plan.corpus, plan.tasks[segment.task], plan.column, lambda _: None):
        if isinstance(piece, NoText):
            continue
        seen += len(piece.text)
        if number == segment.number and piece.ends_document and seen <= limit:
            found = seen
        if seen >= SEGMENT:
            number, seen = number + 1, 0
            if number > segment.number:
                break
    assert found >= 0
    return found


class Half:
    """Text and its tokens."""

    def __init__(self, continues: bool = False) -> None:
        """continues: whether the first piece continues a text."""
        self.characters = self.bytes = self.tokens = 0
        self._ids: list[np.ndarray] = []
        self._within = continues  # whether the next piece continues a text
        self._documents: list[str] = []  # whole ones, to be encoded together
        self._buffered = 0  # characters in them

    def add(self, piece: Piece) -> None:
        self.characters += len(piece.text)
        if piece.ends_document and not self._within:
            self._documents.append(piece.text)
            self._buffered += len(piece.text)
            if self._buffered >= _BUFFER:
                self.finish()
        else:
            self.finish()
            if piece.text:
                self._take(piece.text, tokenizer.encode(piece.text))
                self._count(piece.text)
            if piece.ends_document:
                self._take("", _END_OF_TEXT)
                self._end_document()
        self._within = not piece.ends_document

    def ids(self) -> np.ndarray:
        """The token ids, [tokens]."""
        self.finish()
        return np.concatenate([_END_OF_TEXT[:0], *self._ids])

    def counts(self) -> np.ndarray:
        """How often each id occurs, [vocabulary]."""
        self.finish()
        counts = np.zeros(tokenizer.VOCAB_SIZE, dtype=np.int64)
        for ids in self._ids:  # bincount needs 8 bytes a token
            counts += np.bincount(ids, minlength=tokenizer.VOCAB_SIZE)
        return counts

    def finish(self) -> None:
        """Encode the documents that are left."""
        documents, self._documents, self._buffered = self._documents, [], 0
        if documents:
            self._take("".join(documents), tokenizer.encode_documents(documents))
            self._count("\n\n".join(documents))
            self._end_document()

    def _take(self, text: str, ids: np.ndarray) -> bytes:
        """Keep the tokens of a text; return it in UTF-8."""
        encoded = text.encode()
        self.bytes += len(encoded)
        self.tokens += len(ids)
        self._ids.append(ids)
        return encoded

    def _count(self, text: str) -> None:
        """For statistics of the text; documents are separated by blank lines."""

    def _end_document(self) -> None:
        """The same, at the end of a document."""


class _Builder(Half):
    """A segment that is being encoded."""

    def __init__(self, continues: bool) -> None:
        super().__init__(continues)
        self._facts = Facts()
        self._hash = hashlib.sha256()
        self._statistics = CorpusStatistics(tokenizer.VOCAB_SIZE, continues)

    def add(self, piece: Piece) -> None:
        super().add(piece)
        facts = self._facts
        facts.is_blank = facts.is_blank and (not piece.text or piece.text.isspace())
        if piece.ends_document:
            facts.documents += 1
            if facts.first_end is None:
                facts.first_end = self.characters

    def leave_out(self, document: NoText) -> None:
        self._facts.without_text += 1
        if self._facts.first_without_text is None:
            self._facts.first_without_text = [document.file, document.number, document.start]

    def save(self, path: Path) -> None:
        ids, counts = self.ids(), self.counts().astype(np.uint32)
        facts = self._facts
        facts.characters, facts.bytes, facts.tokens = self.characters, self.bytes, self.tokens
        facts.text_sha256 = self._hash.hexdigest()
        self._statistics.characters = self.characters
        facts.statistics = self._statistics.to_json()
        described = np.frombuffer(json.dumps(dataclasses.asdict(facts)).encode(), dtype=np.uint8)
        with path.open("wb") as file:
            np.savez(file, ids=ids, counts=counts, facts=described)

    def _take(self, text: str, ids: np.ndarray) -> bytes:
        encoded = super()._take(text, ids)
        self._hash.update(encoded)
        return encoded

    def _count(self, text: str) -> None:
        self._statistics.add_text(text)

    def _end_document(self) -> None:
        self._statistics.end_document()


def _segments(
    plan: Plan, task: int, known: set[int], consumed: Consumed
) -> Iterator[tuple[int, _Builder | None, bool]]:
    """Yield the segments of a task: number, content, whether it is the last. The content of known
    segments is None: their text is read, but not encoded."""
    pieces = tasks.read(plan.corpus, plan.tasks[task], plan.column, consumed)
    within = tasks.continues(plan.corpus, plan.tasks[task])
    number, following = 0, next(pieces, None)
    while True:
        builder = None if number in known else _Builder(within)
        characters = 0
        while following is not None and characters < SEGMENT:
            if isinstance(following, NoText):
                if builder:
                    builder.leave_out(following)
            else:
                if builder:
                    builder.add(following)
                characters += len(following.text)
                within = not following.ends_document
            following = next(pieces, None)
        yield number, builder, following is None
        if following is None:
            return
        number += 1
