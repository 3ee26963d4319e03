"""The source of the text: a named corpus, or the user's own file or folder under data/raw.

A text may be larger than memory, so it is read in chunks.
"""

import codecs
import difflib
import errno
import functools
import hashlib
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from folio.corpus import folder, shakespeare
from folio.errors import UserError

# The named corpora. Each loader returns the text and the index at which its validation part begins.
NAMED: dict[str, Callable[[], tuple[str, int]]] = {
    "tinyshakespeare": shakespeare.load_tinyshakespeare,
    "shakespeare": shakespeare.load_all_plays,
}
RAW = Path("data", "raw")  # tracked by DVC: a change in it reruns the pipeline
_IGNORED = ".ipynb_checkpoints"  # in .dvcignore
CHUNK = 1 << 20  # bytes of a file, or characters of a named corpus, to read at once


@dataclass(frozen=True)
class Corpus:
    name: str  # a key of NAMED, or the path from the project's root, in printable characters
    characters: int
    train_characters: int  # number of characters for training; the rest are for validation
    read: Callable[[], Iterator[str]]
    files: tuple[str, ...] = ()  # of a folder: the files that are read, relative to it
    left_out: tuple[str, ...] = ()  # of a folder: what is not read, relative to it
    repeated: tuple[tuple[str, ...], ...] = ()  # of a folder: the files that have the same text

    def chunks(self) -> Iterator[str]:
        """Yield the text in non-empty strings of at most CHUNK characters.

        Raises UserError if a file can no longer be read, or if the length of the text has changed.
        """
        remaining = self.characters
        for chunk in self.read():
            remaining -= len(chunk)
            yield chunk
        if remaining:
            raise UserError(f"{self.name} changed while it was being read: run the command again")


def read(name: str, validation_fraction: float, root: Path) -> Corpus:
    """Return the named corpus, or the text of the file or folder `name` under root/data/raw.

    A file is used unchanged, except that a byte-order mark is removed. In a folder, the .txt files
    that folder.find_texts returns are joined in the order of their paths. The last
    `validation_fraction` of the characters is used for validation. The named corpora ignore
    `validation_fraction`: they are all validated on the last tenth of tinyshakespeare, so that
    their losses are comparable.

    Raises UserError if there is no such corpus, or if its text is not usable.
    """
    if name in NAMED:
        return _load_named(name)
    path = _resolve(name, root)
    display_name = _display_path(path, root)
    paths, left_out = _find_texts(path, root) if path.is_dir() else ([path], [])
    characters, is_blank = 0, True
    for chunk in _read_files(paths, root):
        characters += len(chunk)
        is_blank = is_blank and chunk.isspace()
    if is_blank:
        raise UserError(
            f"{display_name} contains no text: add some, or choose another prepare.corpus"
        )
    train_characters = int(characters * (1 - validation_fraction))
    if train_characters in (0, characters):
        part = "validation" if train_characters else "training"
        raise UserError(
            f"{display_name} has {characters} characters, so prepare.validation_fraction "
            f"{validation_fraction} leaves none for {part}: change it, or use a longer text"
        )
    return Corpus(
        display_name,
        characters,
        train_characters,
        read=functools.partial(_read_files, paths, root),
        files=tuple(
            _printable(each.relative_to(path).as_posix()) for each in paths if each != path
        ),
        left_out=tuple(map(_printable, left_out)),
        repeated=_find_repeated(paths, path, root),
    )


def check_exists(name: str, root: Path) -> None:
    """Raise UserError unless `name` is a corpus that `read` may accept; does not read its text."""
    if name not in NAMED:
        _resolve(name, root)


def _load_named(name: str) -> Corpus:
    text, validation_start = NAMED[name]()

    def read_text() -> Iterator[str]:
        return (text[start : start + CHUNK] for start in range(0, len(text), CHUNK))

    return Corpus(name, len(text), validation_start, read_text)


def _resolve(name: str, root: Path) -> Path:
    """Return the real path, with symbolic links resolved, of a file or folder in data/raw."""
    try:
        path = (root / name).resolve(strict=True)
    except PermissionError as error:
        raise _unreadable(_printable(name), error) from None
    except (OSError, ValueError, RuntimeError):  # missing, a null byte, a cycle of links
        texts = [_display_path(path, root) for path in (root / RAW).rglob("[!.]*")]
        similar = difflib.get_close_matches(name, [*NAMED, *texts], n=1)
        hint = f"; did you mean {similar[0]}?" if similar else ""
        raise UserError(
            f"prepare.corpus: '{_printable(name)}' is neither {' nor '.join(NAMED)} "
            f"nor a path under {RAW}{hint}"
        ) from None
    _check_inside(path, _printable(name), root)
    return path


def _check_inside(path: Path, display_name: str, root: Path) -> None:
    """Raise UserError unless a real path is in data/raw, where DVC detects changes."""
    if _IGNORED in path.parts[len((root / RAW).resolve().parts) :]:
        raise UserError(
            f"prepare.corpus: {display_name} is in a folder {_IGNORED}, which DVC ignores"
            f" (.dvcignore): copy it to another folder in {RAW}"
        )
    if not path.is_relative_to((root / RAW).resolve()):
        raise UserError(
            f"prepare.corpus: {display_name} is outside {RAW}, so DVC would not detect changes in "
            f"it: copy it to {RAW} and use that path"
        )


def _display_path(path: Path, root: Path) -> str:
    """Return a path relative to the project's root, with slashes, for messages and meta.json."""
    for base in (root, root.resolve()):
        if path.is_relative_to(base):
            return _printable(path.relative_to(base).as_posix())
    inside = path.relative_to((root / RAW).resolve())  # data/raw itself is a symbolic link
    return _printable((RAW / inside).as_posix())


def _printable(name: str) -> str:
    """Return a file name as one printable line of limited length.

    Line breaks, terminal control codes and undecodable bytes are escaped. A very long name is
    shortened in the middle.
    """
    name = name if len(name) <= 300 else f"{name[:150]}...{name[-147:]}"
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in name)


def _find_texts(path: Path, root: Path) -> tuple[list[Path], list[str]]:
    """Like folder.find_texts, but raises UserError."""
    name = _display_path(path, root)
    try:
        texts, left_out = folder.find_texts(path)
    except OSError as error:
        raise _unreadable(_display_path(Path(error.filename), root), error) from None
    if not texts:
        but = f" except {_printable(left_out[0])}, which is left out" if left_out else ""
        raise UserError(
            f"{name} contains no .txt file{but}: add one, or choose another prepare.corpus"
        )
    return texts, left_out


def _find_repeated(paths: list[Path], top: Path, root: Path) -> tuple[tuple[str, ...], ...]:
    """Return the groups of files that have the same text, apart from white space."""
    names: dict[str, list[str]] = {}
    for path in paths if len(paths) > 1 else []:
        digest = hashlib.sha256()
        for chunk in _read_file(path, root):
            digest.update("".join(chunk.split()).encode())
        name = _printable(path.relative_to(top).as_posix())
        names.setdefault(digest.hexdigest(), []).append(name)
    names.pop(hashlib.sha256().hexdigest(), None)  # files without text
    return tuple(tuple(group) for group in names.values() if len(group) > 1)


def _read_files(paths: list[Path], root: Path) -> Iterator[str]:
    """Yield the files' text in chunks, with a line break after each file that does not end with
    one."""
    last_character = "\n"
    for path in paths:
        if last_character != "\n":
            yield (last_character := "\n")
        for chunk in _read_file(path, root):
            yield chunk
            last_character = chunk[-1]


def _read_file(path: Path, root: Path) -> Iterator[str]:
    """Yield a UTF-8 file's text in chunks, without the byte-order mark; line breaks are kept."""
    display_name = _display_path(path, root)
    decoder = codecs.getincrementaldecoder("utf-8")()
    try:
        _check_inside(path.resolve(strict=True), display_name, root)
        if not path.is_file():  # reading a pipe could block forever, a device may be endless
            raise OSError(errno.EINVAL, "it is not a regular file")
        with path.open("rb") as file:
            at_end = False
            while not at_end:
                pending, _ = decoder.getstate()  # the first bytes of an incomplete character
                start = file.tell() - len(pending)
                block = file.read(CHUNK)
                at_end = not block
                text = decoder.decode(block, final=at_end)
                if start == 0:
                    text = text.removeprefix("\ufeff")
                if text:
                    yield text
    except UnicodeDecodeError as error:
        position = start + error.start
        raise UserError(
            f"{display_name} is not valid UTF-8 at byte {position}: convert it to UTF-8"
        ) from None
    except RuntimeError:  # a cycle of symbolic links, before Python 3.13
        cycle = OSError(errno.ELOOP, os.strerror(errno.ELOOP))
        raise _unreadable(display_name, cycle) from None
    except OSError as error:
        raise _unreadable(display_name, error) from None


def _unreadable(display_name: str, error: OSError) -> UserError:
    return UserError(
        f"{display_name} cannot be read ({error.strerror}): make it a readable regular file, or "
        "choose another prepare.corpus"
    )
