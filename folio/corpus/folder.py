"""The text files of a folder, without the files that tools leave there."""

import os
import re
from pathlib import Path
from typing import NoReturn

# What is read: text, one JSON object per line, and tables. The first two may be compressed.
_READ = re.compile(
    r".*\.(?P<kind>txt|jsonl|ndjson|parquet)(\.(?P<compression>gz|zst))?", re.I | re.S
)
# What is not: other forms of data, and what is compressed or packed in another way.
_DATA = re.compile(r".*\.(json|csv|tsv|arrow|feather)", re.I | re.S)
_PACKED = re.compile(r".*\.(gz|zst|xz|lzma|bz2|lz4|br|zip|7z|rar|tar|tgz|tbz2|txz)", re.I | re.S)

# Folders and files that editors, operating systems and synchronization tools create next to the
# user's own: checkpoints of notebooks, parts of archives from macOS, deleted files, other versions.
_FOLDERS = {"__macosx", "__pycache__", "lost+found", "$recycle.bin", "#recycle", "@eadir"}
_SUFFIX = r"\.(txt|jsonl|ndjson|parquet)(\.gz|\.zst)?"
_FILES = re.compile(
    r"~.*"  # ~$letters.txt
    rf"|.*(~|\.bak|\.swp|\.tmp){_SUFFIX}"  # letters~.txt, letters.bak.txt
    rf"|.*\.sync-conflict-[\w-]+{_SUFFIX}"  # Syncthing
    rf"|.*\([^)]*conflicted copy[^)]*\){_SUFFIX}",  # Dropbox, Nextcloud
    re.IGNORECASE | re.DOTALL,
)


def kind_of(name: str) -> tuple[str, str] | None:
    """Return the kind of a file, txt, jsonl or parquet, and its compression, gz, zst or "".

    None if a file with this name is not read as part of a folder.
    """
    found = _READ.fullmatch(name)
    if not found:
        return None
    kind = found["kind"].lower()
    return "jsonl" if kind == "ndjson" else kind, (found["compression"] or "").lower()


def is_data(name: str) -> bool:
    """Whether a file that is not read as part of a folder has data of another form, by its name."""
    return bool(_DATA.fullmatch(name))


def is_packed(name: str) -> bool:
    """Whether a file that is not read as part of a folder is compressed, by its name."""
    return not kind_of(name) and bool(_PACKED.fullmatch(name))


def find_texts(folder: Path) -> tuple[list[Path], list[str]]:
    """Return the text files in a folder, at any depth, in the order of their paths; and what is
    left out, as paths relative to the folder.

    Hidden files and folders, files that tools leave behind, links to folders, and data of other
    forms are left out. Raises OSError, with the folder as its filename, if a folder cannot be
    listed.
    """
    texts: list[Path] = []
    left_out: list[str] = []
    for parent, folders, names in os.walk(folder, onerror=_raise):
        for name in list(folders):
            path = Path(parent, name)
            if path.is_symlink():  # os.walk does not follow it
                left_out.append(f"{path.relative_to(folder).as_posix()} (a link to a folder)")
            elif name.startswith(".") or name.lower() in _FOLDERS:
                folders.remove(name)
                left_out += _names_below(path, folder)
        for name in names:
            if kind_of(name):
                path = Path(parent, name)
                if name.startswith(".") or _FILES.fullmatch(name):
                    left_out.append(path.relative_to(folder).as_posix())
                else:
                    texts.append(path)
            elif not name.startswith(".") and (is_data(name) or is_packed(name)):
                left_out.append(Path(parent, name).relative_to(folder).as_posix())
    texts.sort(key=lambda path: path.relative_to(folder).as_posix())
    return texts, sorted(left_out)


def _names_below(path: Path, folder: Path) -> list[str]:
    """The text files below a folder that is left out."""
    return [
        Path(parent, name).relative_to(folder).as_posix()
        for parent, _, names in os.walk(path)
        for name in names
        if kind_of(name)
    ]


def _raise(error: OSError) -> NoReturn:  # by default, os.walk skips folders that it cannot read
    raise error
