"""Reads text files, plain or compressed, and the documents in .jsonl and .parquet files.

A file may be larger than memory, so it is read in blocks.
"""

import codecs
import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from folio.corpus import tables
from folio.corpus.corpus import TextFile
from folio.corpus.opening import Consumed, opened
from folio.errors import UserError

CHUNK = 1 << 20  # bytes to read at once
_BOM = codecs.BOM_UTF8


class Document(NamedTuple):
    text: str  # may be empty: null is an empty text
    number: int  # of its line or row, from 1, counted from `start`
    start: int  # 0, or a byte of a .jsonl file


class _NoTextError(ValueError):
    """What is wrong with a line of JSON, and how to fix it."""


def read_text(
    file: TextFile, start: int, end: int | None, consumed: Consumed = lambda _: None
) -> Iterator[str]:
    """Yield a UTF-8 file's text in non-empty blocks, without the byte-order mark; line breaks are
    kept.

    start, end: bytes of an uncompressed file. The text begins with the first character that begins
    at `start` or later, and ends where the text from `end` on would begin. None: to the end.
    """
    decoder = codecs.getincrementaldecoder("utf-8")()
    position = start
    try:
        with opened(file, consumed) as stream:
            if start:
                stream.seek(start)
                position += len(_continuation(stream))
            while True:
                pending, _ = decoder.getstate()  # the first bytes of an incomplete character
                block = stream.read(CHUNK if end is None else max(0, min(CHUNK, end - position)))
                if not block and end is not None:
                    block, end = _continuation(stream), None
                    at_end = True
                else:
                    at_end = not block
                text = decoder.decode(block, final=at_end)
                position += len(block)
                if start == 0 and position == len(pending) + len(block):
                    text = text.removeprefix("\ufeff")
                if text:
                    yield text
                if at_end:
                    return
    except UnicodeDecodeError as error:
        where = position - len(pending) + error.start
        of = " of the decompressed text" if file.compression else ""
        raise UserError(
            f"{file.name} is not valid UTF-8 at byte {where}{of}: convert it to UTF-8"
        ) from None


def read_documents(
    file: TextFile, start: int, end: int, column: str, consumed: Consumed = lambda _: None
) -> Iterator[Document]:
    """Yield the documents of a .jsonl or .parquet file.

    start, end: of an uncompressed .jsonl file, bytes: the lines that begin there; of a .parquet
    file, row groups. column: the key or the column that contains the text. Raises UserError with
    the line or row of what is not valid.
    """
    if file.kind == "parquet":
        for text, row in tables.read_rows(file, start, end, column, consumed):
            yield Document(text, row, 0)
    else:
        yield from _read_lines(file, start, end, column, consumed)


def place_of(file: TextFile, number: int, start: int) -> str:
    """The place of a Document in a message: its file, and its line or row."""
    if file.kind == "parquet":
        return f"{file.name} row {number:,}"
    return f"{file.name} line {number + _count_lines(file, start):,}"


def _read_lines(
    file: TextFile, start: int, end: int, column: str, consumed: Consumed
) -> Iterator[Document]:
    number, position = 0, 0  # of lines since `start`
    with opened(file, consumed) as stream:
        if start:
            stream.seek(start - 1)
            position = start - 1 + len(stream.readline())
        while file.compression or position < end:
            line = stream.readline()
            if not line:
                return
            position += len(line)
            number += 1
            if number == 1 and not start:
                line = line.removeprefix(_BOM)
            if not line.isspace() and line:
                try:
                    text = _text_of(line, column)
                except (ValueError, RecursionError) as error:
                    problem = str(error) if isinstance(error, _NoTextError) else _not_json(error)
                    raise UserError(f"{place_of(file, number, start)} {problem}") from None
                yield Document(text, number, start)


def _text_of(line: bytes, column: str) -> str:
    """The text in a line of JSON. Raises _NoTextError with the problem and a hint."""
    found: Any = json.loads(line.decode())
    if not isinstance(found, dict):
        raise _NoTextError('is not a JSON object: each line must be one, such as {"text": "..."}')
    if column not in found:
        raise _NoTextError(tables.no_column(column, list(found)))
    text = found[column]
    if text is None or text != text:  # NaN: json.dump of a text that pandas misses
        text = ""
    if not isinstance(text, str):
        raise _NoTextError(
            f"has no text in {tables.quoted(column)}: set prepare.text_column to a key with text"
        )
    return _without_surrogates(text)


def _not_json(error: Exception) -> str:
    if isinstance(error, UnicodeDecodeError):
        return "is not valid UTF-8: convert the file to UTF-8"
    return "is not valid JSON: fix or remove it"


def _count_lines(file: TextFile, start: int) -> int:
    """The number of lines that begin before the first one that begins at byte `start` or later."""
    if not start:
        return 0
    with Path(file.path).open("rb") as stream:
        count = sum(1 for _ in iter(lambda: stream.tell() < start and stream.readline(), False))
    return count


def _continuation(stream: BinaryIO) -> bytes:
    """Read the bytes at this place that continue a character, at most 3."""
    found = b""
    while len(found) < 3:
        byte = stream.read(1)
        if not byte or byte[0] & 0xC0 != 0x80:
            if byte:
                stream.seek(-1, io.SEEK_CUR)
            break
        found += byte
    return found


def _without_surrogates(text: str) -> str:
    """Replace lone surrogates, which JSON may contain, by U+FFFD."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text
