"""Reads a consistent version of a model folder, even if other processes are replacing its files.

At its end, training replaces the folder; `dvc checkout` replaces its files one by one, and `cp`
overwrites them. So each file is opened once and read through its descriptor, which refers to the
same file even after it is renamed or removed. After everything has been read, the reader checks
that no file was changed or replaced in the meantime; otherwise it starts over.
"""

import contextlib
import os
import stat
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import IO, TypeVar

from folio.errors import UserError

T = TypeVar("T")

# All in seconds. A file system may give all writes within 10 ms the same time, so a file that was
# written less than SETTLED ago could change unnoticed. If a file is invalid, its writer may just be
# slow, so it is an error only if no file was written for SETTLED_AFTER_ERROR.
SETTLED = 0.02
SETTLED_AFTER_ERROR = 1.0
PATIENCE = 10.0  # after which a folder that keeps changing is an error
_SAVING = 2.0  # waiting for a folder that huggingface.save is about to rename
_PAUSE = 0.005

_SUFFIXES = (".json", ".safetensors", ".txt")

Identity = tuple[int, ...]


class _ChangedError(Exception):
    """A file of the folder is being written."""


class ModelFiles:
    """The open files of a folder.

    Its methods raise OSError for a file that is missing, cannot be read or is not a regular file.
    """

    def __init__(self, folder: Path, directory: int, deadline: float):
        """directory: a descriptor of the folder. deadline: by time.monotonic()."""
        self.folder = folder  # as the user named it, for error messages
        self._directory, self._deadline = directory, deadline
        self._opened: dict[str, int] = {}
        self._read: dict[str, Identity] = {}  # what was read of the opened files
        self._missing: set[str] = set()

    def open(self, names: Iterable[str]) -> None:
        """Open files that are to be read soon, as far as that is possible.

        It takes less time than reading them, in which the folder may be replaced and removed.
        """
        for name in names:
            with contextlib.suppress(OSError):
                self._open(name)

    def descriptor(self, name: str) -> int:
        """An open descriptor of a file in the folder. Waits until no one is writing to the file."""
        fd = self._open(name)
        if name not in self._read:
            while _is_recent(status := os.fstat(fd), SETTLED) and not self._is_replaced():
                if time.monotonic() > self._deadline:
                    raise _ChangedError
                time.sleep(_PAUSE)
            self._read[name] = _identity(status)
        return fd

    def exists(self, name: str) -> bool:
        try:
            self.descriptor(name)
        except FileNotFoundError:
            return False
        except OSError:
            pass  # it exists, but cannot be read
        return True

    def read(self, name: str, max_bytes: int) -> bytes:
        """The content of a file of at most max_bytes bytes."""
        fd = self.descriptor(name)
        if os.fstat(fd).st_size > max_bytes:
            raise OSError(f"it is larger than {max_bytes:,} bytes")
        return os.pread(fd, max_bytes, 0)

    def wait_until_quiet(self) -> float:
        """Wait until nothing in the folder is being written, for half of the time that is left.

        Returns when that was, by time.time(). Another program replaces the files one by one: then
        the config may be new and the weights still old.
        """
        deadline = (time.monotonic() + self._deadline) / 2
        while not self.is_quiet_since(now := time.time()) and time.monotonic() < deadline:
            time.sleep(_PAUSE)
        return now

    def is_quiet_since(self, moment: float) -> bool:
        """Whether no file of a model was written from shortly before a moment on.

        Nor was any file added, renamed or removed: this changes the time of the folder.
        """
        if self._is_replaced():
            return True
        with os.scandir(self._directory) as entries, contextlib.suppress(FileNotFoundError):
            files = (entry for entry in entries if entry.name.endswith(_SUFFIXES))
            found = [entry.stat(follow_symlinks=False) for entry in files]
            newest = max(map(_last_change, [*found, os.fstat(self._directory)]))
            return not moment - SETTLED < newest <= time.time()  # the future is another clock's
        return False

    def is_one_version(self) -> bool:
        """Whether everything that was read belongs to the same version of the model."""
        replaced = self._is_replaced()  # as a whole; the old files may be removed, and are complete
        for name, before in self._read.items():
            if _identity(os.fstat(self._opened[name])) != before:
                return False
            if not replaced and self._stat(name) != before:
                return False
        return replaced or not any(self._stat(name) for name in self._missing)

    def is_settled(self) -> bool:
        """Whether no file has been written to or removed recently: then an error is final."""
        if self._is_replaced():
            return False
        opened = map(os.fstat, self._opened.values())
        return not any(_is_recent(status, SETTLED_AFTER_ERROR) for status in opened)

    def close(self) -> None:
        for fd in self._opened.values():
            os.close(fd)

    def _open(self, name: str) -> int:
        if name in self._opened:
            return self._opened[name]
        # O_NONBLOCK: opening a named pipe that has no writer would block. It is not opened at all,
        # unless it has just replaced a file.
        try:
            if not stat.S_ISREG(os.stat(name, dir_fd=self._directory).st_mode):
                raise OSError("it is not a regular file")
            fd = os.open(name, os.O_RDONLY | os.O_NONBLOCK, dir_fd=self._directory)
        except FileNotFoundError:
            self._missing.add(name)
            raise
        self._opened[name] = fd
        return fd

    def _stat(self, name: str) -> Identity | None:
        try:
            return _identity(os.stat(name, dir_fd=self._directory))
        except OSError:
            return None

    def _is_replaced(self) -> bool:
        """Whether the folder's path now refers to another folder, or to none."""
        try:
            return not os.path.samestat(self.folder.stat(), os.fstat(self._directory))
        except OSError:
            return True


def read(folder: Path, first: Iterable[str], parse: Callable[[ModelFiles], T]) -> T:
    """Return parse(files), with all files read from the same version of the model.

    first: the files to open before anything else, in case the folder is just being replaced.

    If the folder was changed in the meantime, parse is called again, whatever it returned or
    raised. Raises the UserError of `parse`, or UserError if the folder does not exist or keeps
    changing.
    """
    deadline = time.monotonic() + PATIENCE
    while time.monotonic() < deadline:
        with _opened(folder, deadline) as files, contextlib.suppress(_ChangedError):
            files.open(first)
            problem, started = None, files.wait_until_quiet()
            try:
                result = parse(files)
            except UserError as error:
                problem = error
            if files.is_one_version():
                if not problem and files.is_quiet_since(started):
                    return result
                if problem and files.is_settled():
                    raise problem
        time.sleep(_PAUSE)
    raise UserError(f"{folder} is being written: try again when the other program has finished")


@contextlib.contextmanager
def private_copy(fd: int) -> Iterator[tuple[Path, Callable[[], None]]]:
    """Yield the path of a copy of a safetensors file, and a function that completes the copy.

    Before that, the copy has the header and the size of the whole file, but takes little memory. It
    is in memory, so no one can change it: mapping the file itself would get the process killed
    (SIGBUS) if another program truncated the file.
    """
    size = os.fstat(fd).st_size
    length = int.from_bytes(os.pread(fd, 8, 0), "little")
    header = os.pread(fd, 8 + min(length, 1 << 27), 0)  # safetensors allows 100 MB
    with _file_in_memory() as (file, path):
        file.write(header)
        file.truncate(size)

        def complete() -> None:
            while chunk := os.pread(fd, 1 << 24, file.tell()):
                file.write(chunk)
            file.flush()

        yield path, complete


@contextlib.contextmanager
def _file_in_memory() -> Iterator[tuple[IO[bytes], Path]]:
    """A new file and its path; a temporary file if there is no memfd_create."""
    if hasattr(os, "memfd_create"):
        with os.fdopen(os.memfd_create("folio"), "r+b") as file:
            yield file, Path(f"/proc/self/fd/{file.fileno()}")
    else:
        with tempfile.NamedTemporaryFile(prefix="folio-") as temporary:
            yield temporary.file, Path(temporary.name)


@contextlib.contextmanager
def _opened(folder: Path, deadline: float) -> Iterator[ModelFiles]:
    """The files of a folder. Raises UserError if there is no such folder."""
    directory = _open_folder(folder)
    files = ModelFiles(folder, directory, deadline)
    try:
        yield files
    finally:
        files.close()
        os.close(directory)


def _open_folder(folder: Path) -> int:
    """A descriptor of the folder. Waits while huggingface.save is replacing it."""
    started = time.monotonic()
    while True:
        try:
            return os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        except (FileNotFoundError, NotADirectoryError, ValueError):
            saving = folder.with_name(f".{folder.name}.partial") if folder.name else folder
            patience = _SAVING if saving.is_dir() else 10 * _PAUSE
            if time.monotonic() > started + patience:
                raise missing(folder) from None
        except OSError as error:
            raise UserError(f"{folder} cannot be read: {error.strerror}") from None
        time.sleep(_PAUSE)


def missing(folder: Path) -> UserError:
    return UserError(f"there is no model in {folder}: `dvc repro train` trains one")


def _identity(status: os.stat_result) -> Identity:
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns


def _is_recent(status: os.stat_result, seconds: float) -> bool:
    """Whether the file was written less than so many seconds ago."""
    age = time.time() - _last_change(status)
    return 0 <= age < seconds  # a time in the future comes from another clock


def _last_change(status: os.stat_result) -> float:
    return max(status.st_mtime, status.st_ctime)
