"""Space on disk: how much files take, how much their removal frees, and how it is printed."""

import os
import shutil
from collections.abc import Iterator
from pathlib import Path


def of(path: Path) -> int:
    """The bytes on disk of a file, or of all files in a folder; 0 if it does not exist.

    Links are not followed, except for `path` itself. A file with several hard links counts once.
    """
    inodes = {(s.st_dev, s.st_ino): s.st_blocks * 512 for s in _statuses(path)}
    return sum(inodes.values())


def remove(path: Path) -> int:
    """Remove a file or a folder, if it exists, and return the bytes on disk that this freed.

    A file that has another hard link elsewhere frees nothing. A link is removed, not its target.
    """
    if not os.path.lexists(path):
        return 0
    if path.is_symlink() or not path.is_dir():
        status = path.lstat()
        path.unlink()
        return status.st_blocks * 512 if status.st_nlink == 1 else 0
    inodes = {s.st_ino: s.st_blocks * 512 for s in _statuses(path) if s.st_nlink == 1}
    shutil.rmtree(path)
    return sum(inodes.values())


def shown(size: int) -> str:
    """A size for people, such as `27.3 MB`."""
    if size >= 1e9:
        return f"{size / 1e9:,.2f} GB"
    return f"{size / 1e6:,.1f} MB"


def _statuses(path: Path) -> Iterator[os.stat_result]:
    if not path.is_dir():
        if os.path.lexists(path):
            yield path.lstat()
        return
    for folder, _, names in os.walk(path):
        for name in names:
            try:
                yield Path(folder, name).lstat()
            except FileNotFoundError:  # a temporary file of a process that runs now
                continue
