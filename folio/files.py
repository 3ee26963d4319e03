"""Atomic file writes, and safe reads of files from untrusted sources."""

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
def naming(path: Path) -> Iterator[None]:
    """Add the path to an OSError in this block that names none, as of a write to an open file."""
    try:
        yield
    except OSError as error:
        if error.errno is not None and error.filename is None:
            error.filename = str(path)
        raise


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a temporary path next to `path`; when the block ends, rename it to `path`.

    The content is flushed to disk before the rename, so a reader, or a run after a power failure,
    sees either the old file or the complete new one. If the block raises (full disk, Ctrl-C), the
    temporary file is removed and the old file remains. An OSError in it names a file. Creates the
    parent folder if necessary. The temporary name has the same suffix, for writers that derive the
    format from it.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.stem}.{uuid.uuid4().hex[:8]}{path.suffix}")
    try:
        with naming(path):
            yield temporary
            with temporary.open("rb+") as file:
                os.fsync(file.fileno())
            temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)  # it no longer exists after a successful rename


def write_text(path: Path, text: str) -> None:
    """Write a UTF-8 file atomically."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def touch(path: Path) -> None:
    """Change the modification time of a file, so that git reads its content.

    git compares sizes and times, the latter in whole seconds on some systems. `dvc exp run -S` may
    write params.yaml within the second in which git last saw it: then git regards it as unchanged,
    and `git checkout` does not restore it.
    """
    later = path.stat().st_mtime + 2
    os.utime(path, (later, later))


def remove_folder(path: Path) -> None:
    """Remove a folder, if it exists. Renames it first, so that if the process is killed halfway, no
    incomplete folder is left under that name."""
    if path.exists():
        shutil.rmtree(path.rename(path.with_suffix(".old.tmp")))


def read(path: Path, max_bytes: int | None = None) -> bytes:
    """Return the content of a regular file of at most `max_bytes` bytes.

    Raises OSError for anything else, such as a pipe, which could block forever, or a device, which
    could be endless.
    """
    status = path.stat()
    if stat.S_ISDIR(status.st_mode):
        raise IsADirectoryError(errno.EISDIR, "it is a folder", path)
    if not stat.S_ISREG(status.st_mode):
        raise OSError(errno.EINVAL, "it is not a regular file", path)
    if max_bytes is not None and status.st_size > max_bytes:
        raise OSError(errno.EFBIG, f"it is larger than {max_bytes:,} bytes", path)
    return path.read_bytes()


def md5(path: Path) -> str:
    """Return the MD5 of a file's content, in hex: the hash that DVC uses to identify files."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.md5(usedforsecurity=False)).hexdigest()


def sha256(path: Path) -> str:
    """Return the SHA-256 of a file's content, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
