"""Reads the text column of .parquet files."""

import contextlib
from collections.abc import Iterator

import pyarrow as pa
import pyarrow.parquet as pq

from folio.corpus.corpus import TextFile, printable
from folio.corpus.opening import Consumed, damaged, opened
from folio.errors import UserError

_ROWS = 500  # to read at once
_BUFFER = 1 << 20  # bytes
_MOST = 60  # characters of a name or a type in a message


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


def read_rows(
    file: TextFile, start: int, end: int, column: str, consumed: Consumed
) -> Iterator[tuple[str, int]]:
    """Yield the texts in row groups, "" for null, each with the number of its row from 1.

    Raises UserError with the row if a text is not valid, or if the file is damaged.
    """
    with _opened_table(file, column) as table:
        groups = [table.metadata.row_group(n) for n in range(table.metadata.num_row_groups)]
        total = sum(group.total_byte_size for group in groups) or 1
        row = sum(group.num_rows for group in groups[:start])
        for number in range(start, end):
            share = groups[number].total_byte_size / total * file.size
            batches = table.iter_batches(_ROWS, [number], columns=[column], use_threads=False)
            for texts in _texts(file, batches, row):
                for text in texts:
                    row += 1
                    yield text or "", row
                consumed(share * len(texts) / groups[number].num_rows)


def _texts(
    file: TextFile, batches: Iterator[pa.RecordBatch], row: int
) -> Iterator[list[str | None]]:
    """Yield the texts of each batch. Raises UserError if the file is damaged.

    row: the number of rows before the first batch.
    """
    rows = ""
    try:
        for batch in batches:
            rows = f"rows {row + 1:,} to {row + batch.num_rows:,}"
            row += batch.num_rows
            yield batch.column(0).to_pylist()
    except UnicodeDecodeError:
        raise UserError(
            f"{file.name} has text that is not valid UTF-8 in {rows}: convert it to UTF-8"
        ) from None
    except Exception as error:  # pyarrow's errors have many types
        raise damaged(file, error) from None


@contextlib.contextmanager
def _opened_table(file: TextFile, column: str) -> Iterator[pq.ParquetFile]:
    with opened(file, lambda _: None) as raw:
        try:
            table = pq.ParquetFile(raw, buffer_size=_BUFFER, pre_buffer=False)
            schema = table.schema_arrow
            names = schema.names
        except Exception as error:  # pyarrow's errors have many types
            raise damaged(file, error) from None
        if column not in names:
            raise UserError(f"{file.name} {no_column(column, names)}")
        if (count := names.count(column)) > 1:
            raise UserError(
                f"{file.name} has {count} columns {quoted(column)}: rename or remove all but one of"
                " them"
            )
        kind = schema.field(column).type
        kind = kind.value_type if pa.types.is_dictionary(kind) else kind
        if not any(
            test(kind)
            for test in (
                pa.types.is_string,
                pa.types.is_large_string,
                pa.types.is_string_view,
                pa.types.is_null,  # pandas' type of a column without any text
            )
        ):
            raise UserError(
                f"{file.name} has {printable(str(kind), _MOST)} in {quoted(column)}, not text: set"
                " prepare.text_column to a column with text"
            )
        yield table


def no_column(column: str, names: list[str]) -> str:
    """The problem that there is no such column, or key, but these, and what to do."""
    shown = ", ".join(map(quoted, names[:8])) + (", ..." if len(names) > 8 else "")
    return (
        f"has no {quoted(column)}, but {shown or 'nothing'}: set prepare.text_column to one of them"
    )


def quoted(column: str) -> str:
    """The name of a column, or key, for a message."""
    return printable(repr(column), _MOST)
