"""Opens text files, plain or compressed."""

import contextlib
import io
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO, cast

import pyarrow as pa

from folio.corpus.corpus import TextFile, printable, unreadable
from folio.errors import UserError

_BUFFER = 1 << 20  # bytes
_CODECS = {"gz": "gzip", "zst": "zstd"}  # pyarrow's names
Consumed = Callable[[float], None]  # is called with the number of bytes of the file that were read


@contextlib.contextmanager
def opened(file: TextFile, consumed: Consumed) -> Iterator[BinaryIO]:
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
                        yield cast(BinaryIO, io.BufferedReader(cast(Any, stream), _BUFFER))
                except OSError as error:
                    if error.errno is not None:
                        raise
                    raise damaged(file, error) from None
            else:
                yield cast(BinaryIO, io.BufferedReader(cast(Any, _Counted(raw, consumed)), _BUFFER))
    except OSError as error:
        raise unreadable(file.name, error.strerror) from None


def damaged(file: TextFile, error: Exception) -> UserError:
    problem = printable(" ".join(str(error).split()).rstrip(".")[:100])
    return UserError(f"{file.name} is damaged ({problem}): copy it again, or remove it")


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
