"""Writing a file whole or not at all, and reading one from a stranger."""

import contextlib
import errno
import hashlib
import os
import shutil
import stat
import uuid
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`; once the block has written it, it becomes `path`.

    The file's bytes reach the disk before its name does, so a reader, or a run after a power cut,
    finds the old file or the new one. When the block raises (a full disk, Ctrl-C), the temporary
    file is removed and the old file stands. The folder is made if it is not there. The temporary
    name keeps the suffix, for writers that choose a format by it.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.stem}.{uuid.uuid4().hex[:8]}{path.suffix}")
    try:
        yield temporary
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)  # gone already where the replacing went well


def write_text(path: Path, text: str) -> None:
    """Write a UTF-8 file whole or not at all."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def remove_folder(path: Path) -> None:
    """Remove a folder so that a kill leaves no part of it under its name."""
    if path.exists():
        shutil.rmtree(path.rename(path.with_suffix(".old.tmp")))


def read(path: Path, most: int | None = None) -> bytes:
    """The bytes of an ordinary file of at most `most` bytes.

    Raises OSError for anything else in its place: a pipe would be waited for, a device never ends.
    """
    found = path.stat()
    if stat.S_ISDIR(found.st_mode):
        raise IsADirectoryError(errno.EISDIR, "it is a folder", path)
    if not stat.S_ISREG(found.st_mode):
        raise OSError(errno.EINVAL, "it is no ordinary file", path)
    if most is not None and found.st_size > most:
        raise OSError(errno.EFBIG, f"it is larger than {most:,} bytes", path)
    return path.read_bytes()


def sha256(path: Path) -> str:
    """Of a file's content, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
