"""Reads one version of a model folder, even if another program is replacing it.

At the end, training replaces the whole folder; `dvc checkout` and `cp` replace or overwrite one
file after another. All files are opened through one descriptor of the folder, which refers to the
same folder even after that is renamed or removed. What was read is one version if nothing in the
folder has changed since shortly before it was opened. Otherwise everything is read again.
"""

import contextlib
import os
import stat
import time
from collections.abc import Callable
from io import BufferedReader
from pathlib import Path
from typing import TypeVar

from folio.errors import UserError

T = TypeVar("T")

# All in seconds. Writes within 10 ms may get the same timestamp from a file system, so a file that
# was written less than SETTLED ago could change unnoticed. If a file is missing or invalid, its
# writer may just be slow, so it is an error only if nothing was written for SETTLED_AFTER_ERROR.
SETTLED = 0.02
SETTLED_AFTER_ERROR = 1.0
PATIENCE = 10.0  # after which a folder that keeps changing is an error
_RENAMING = 0.1  # waiting for a folder that huggingface.save is renaming
_PAUSE = 0.005


class MissingModelError(UserError):
    """There is no such folder, or it has no config.json."""

    def __init__(self, folder: Path):
        super().__init__(f"there is no model in {folder}: `dvc repro train` trains one")


class ModelFiles:
    """The files of a folder, each of which is opened once."""

    def __init__(self, folder: Path):
        """Raises OSError or ValueError if the folder cannot be opened."""
        self.folder = folder  # as the user named it, for error messages
        self._directory = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        self._time = time.time()
        self._files: dict[str, BufferedReader] = {}
        self._status = {self._directory: os.fstat(self._directory)}  # when it was opened

    def open(self, name: str) -> BufferedReader:
        """A file in the folder, positioned at its start.

        Raises OSError if it is missing, cannot be read or is not a regular file.
        """
        if name not in self._files:
            if not stat.S_ISREG(os.stat(name, dir_fd=self._directory).st_mode):
                raise OSError("it is not a regular file")
            # O_NONBLOCK: a named pipe, which may just have replaced the file, would block.
            fd = os.open(name, os.O_RDONLY | os.O_NONBLOCK, dir_fd=self._directory)
            self._files[name] = os.fdopen(fd, "rb")
            self._status[fd] = os.fstat(fd)
        self._files[name].seek(0)
        return self._files[name]

    def exists(self, name: str) -> bool:
        """Whether there is such an entry, even if it cannot be read."""
        try:
            os.lstat(name, dir_fd=self._directory)
        except OSError as error:
            return not isinstance(error, FileNotFoundError)
        return True

    def read(self, name: str, max_bytes: int) -> bytes:
        """The content of a file of at most max_bytes bytes. Raises OSError."""
        content = self.open(name).read(max_bytes + 1)
        if len(content) > max_bytes:
            raise OSError(f"it is larger than {max_bytes:,} bytes")
        return content

    def is_replaced(self) -> bool:
        """Whether the folder's path now refers to another folder, or to none."""
        try:
            return not os.path.samestat(self.folder.stat(), self._status[self._directory])
        except OSError:
            return True

    def is_unchanged(self, seconds: float) -> bool:
        """Whether neither the folder nor an opened file has changed since `seconds` before the
        folder was opened. A new, renamed or removed file changes the folder."""
        for fd, before in self._status.items():
            changed = max(before.st_mtime, before.st_ctime)
            # A time in the future is from another clock.
            is_recent = self._time - seconds < changed <= time.time()
            if is_recent or _identity(os.fstat(fd)) != _identity(before):
                return False
        return True

    def close(self) -> None:
        for file in self._files.values():
            file.close()
        os.close(self._directory)


def read(folder: Path, parse: Callable[[ModelFiles], T]) -> T:
    """Return parse(files), with all files read from the same version of the model.

    If the folder changes in the meantime, parse is called again, whatever it returned or raised.
    Raises the UserError of `parse`, MissingModelError if the folder does not exist, or UserError if
    it keeps changing.
    """
    deadline = time.monotonic() + PATIENCE
    while time.monotonic() < deadline:
        with contextlib.closing(_open_folder(folder)) as files:
            try:
                result = parse(files)
            except UserError:
                if files.is_unchanged(SETTLED_AFTER_ERROR) and not files.is_replaced():
                    raise
            else:
                # Replacing the whole folder does not change the files in the old one.
                if files.is_unchanged(SETTLED) or files.is_replaced():
                    return result
        time.sleep(_PAUSE)
    raise UserError(f"{folder} is being written: try again when the other program has finished")


def _open_folder(folder: Path) -> ModelFiles:
    deadline = time.monotonic() + _RENAMING
    while True:
        try:
            return ModelFiles(folder)
        except (FileNotFoundError, NotADirectoryError, ValueError):
            if time.monotonic() > deadline:
                raise MissingModelError(folder) from None
        except OSError as error:
            raise UserError(f"{folder} cannot be read: {error.strerror}") from None
        time.sleep(_PAUSE)


def _identity(status: os.stat_result) -> tuple[int, ...]:
    return status.st_size, status.st_mtime_ns, status.st_ctime_ns
