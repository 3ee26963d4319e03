"""Reads text files, plain or compressed, and the documents in .jsonl and .parquet files.

A file may be larger than memory, so it is read in blocks.
"""

import codecs
import contextlib
import io
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, cast

import pyarrow as pa
import pyarrow.parquet as pq

from folio.corpus.corpus import TextFile, unreadable
from folio.errors import UserError

CHUNK = 1 << 20  # bytes to read at once
_ROWS = 500  # of a table, to read at once
_CODECS = {"gz": "gzip", "zst": "zstd"}  # pyarrow's names
_BOM = codecs.BOM_UTF8
Consumed = Callable[[float], None]  # is called with the number of bytes of the file that were read


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
        with _opened(file, consumed) as stream:
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
        yield from _read_rows(file, start, end, column, consumed)
    else:
        yield from _read_lines(file, start, end, column, consumed)


def place_of(file: TextFile, number: int, start: int) -> str:
    """The place of a Document in a message: its file, and its line or row."""
    if file.kind == "parquet":
        return f"{file.name} row {number:,}"
    return f"{file.name} line {number + _count_lines(file, start):,}"


def row_groups(file: TextFile, column: str) -> list[int]:
    """The size of the text column in each row group of a .parquet file, in bytes.

    Raises UserError if the file is damaged or has no such column.
    """
    with _opened_table(file, column) as table:
        position = table.schema_arrow.names.index(column)
        metadata = table.metadata
        nested = metadata.num_columns != len(table.schema_arrow.names)
        return [
            group.total_byte_size if nested else group.column(position).total_uncompressed_size
            for group in map(metadata.row_group, range(metadata.num_row_groups))
        ]


def _read_lines(
    file: TextFile, start: int, end: int, column: str, consumed: Consumed
) -> Iterator[Document]:
    number, position = 0, 0  # of lines since `start`
    with _opened(file, consumed) as stream:
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
        raise _NoTextError(_no_column(column, list(found)))
    text = found[column]
    if text is not None and not isinstance(text, str):
        raise _NoTextError(f"has no text in {column!r}: set prepare.text_column to a key with text")
    return _without_surrogates(text or "")


def _not_json(error: Exception) -> str:
    if isinstance(error, UnicodeDecodeError):
        return "is not valid UTF-8: convert the file to UTF-8"
    return "is not valid JSON: fix or remove it"


def _no_column(column: str, names: list[str]) -> str:
    shown = ", ".join(repr(name) for name in names[:8]) + (", ..." if len(names) > 8 else "")
    return f"has no {column!r}, but {shown or 'nothing'}: set prepare.text_column to one of them"


def _count_lines(file: TextFile, start: int) -> int:
    """The number of lines that begin before the first one that begins at byte `start` or later."""
    if not start:
        return 0
    with Path(file.path).open("rb") as stream:
        count = sum(1 for _ in iter(lambda: stream.tell() < start and stream.readline(), False))
    return count


def _read_rows(
    file: TextFile, start: int, end: int, column: str, consumed: Consumed
) -> Iterator[Document]:
    with _opened_table(file, column) as table:
        groups = [table.metadata.row_group(n) for n in range(table.metadata.num_row_groups)]
        total = sum(group.total_byte_size for group in groups) or 1
        row = sum(group.num_rows for group in groups[:start])
        for number in range(start, end):
            share = groups[number].total_byte_size / total * file.size
            for batch in _checked(
                file,
                table.iter_batches(_ROWS, [number], columns=[column], use_threads=False),
            ):
                try:
                    texts = batch.column(0).to_pylist()
                except UnicodeDecodeError:
                    raise UserError(
                        f"{file.name} has text that is not valid UTF-8 in rows {row + 1:,} to"
                        f" {row + batch.num_rows:,}: convert it to UTF-8"
                    ) from None
                for text in texts:
                    row += 1
                    yield Document(_without_surrogates(text or ""), row, 0)
                consumed(share * batch.num_rows / groups[number].num_rows)


def _checked(file: TextFile, batches: Iterator[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
    """Yield the batches. Raises UserError if the file is damaged."""
    try:
        yield from batches
    except (pa.ArrowException, OSError) as error:
        raise _damaged(file, error) from None


@contextlib.contextmanager
def _opened_table(file: TextFile, column: str) -> Iterator[pq.ParquetFile]:
    with _opened(file, lambda _: None) as raw:
        try:
            table = pq.ParquetFile(raw, buffer_size=CHUNK, pre_buffer=False)
            schema = table.schema_arrow
        except (pa.ArrowException, OSError) as error:
            raise _damaged(file, error) from None
        if column not in schema.names:
            raise UserError(f"{file.name} {_no_column(column, schema.names)}")
        kind = schema.field(column).type
        kind = kind.value_type if pa.types.is_dictionary(kind) else kind
        if not any(
            test(kind)
            for test in (pa.types.is_string, pa.types.is_large_string, pa.types.is_string_view)
        ):
            raise UserError(
                f"{file.name} has {kind} in {column!r}, not text: set prepare.text_column to a"
                " column with text"
            )
        yield table


@contextlib.contextmanager
def _opened(file: TextFile, consumed: Consumed) -> Iterator[BinaryIO]:
    """Open a file, decompressed. Raises UserError if reading it fails."""
    try:
        with Path(file.path).open("rb") as raw:
            if file.kind == "parquet":
                yield raw
            elif file.compression:
                counted = _Counted(raw, consumed)
                try:
                    with pa.input_stream(counted, compression=_CODECS[file.compression]) as stream:
                        # A BufferedReader, as the stream has no fast readline.
                        yield cast(BinaryIO, io.BufferedReader(cast(Any, stream), CHUNK))
                except OSError as error:
                    if error.errno is not None:
                        raise
                    raise _damaged(file, error) from None
            else:
                yield cast(BinaryIO, io.BufferedReader(cast(Any, _Counted(raw, consumed)), CHUNK))
    except OSError as error:
        raise unreadable(file.name, error.strerror) from None


class _Counted(io.RawIOBase):
    """A file that reports how many bytes are read from it."""

    def __init__(self, raw: BinaryIO, consumed: Consumed) -> None:
        self._raw, self._consumed = raw, consumed

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        return self._raw.seek(offset, whence)

    def tell(self) -> int:
        return self._raw.tell()

    def readinto(self, buffer: Any) -> int:
        count = cast(Any, self._raw).readinto(buffer)
        self._consumed(count)
        return count


def _damaged(file: TextFile, error: Exception) -> UserError:
    problem = " ".join(str(error).split()).rstrip(".")[:100]
    return UserError(f"{file.name} is damaged ({problem}): copy it again, or remove it")


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
