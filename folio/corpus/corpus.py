"""Where text comes from: a named corpus, or the user's own file or folder under data/raw.

A text may be larger than the memory, so it is read some of it at a time.
"""

import codecs
import difflib
import errno
import functools
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from folio.corpus import shakespeare
from folio.errors import UserError

NAMED = ("tinyshakespeare", "shakespeare")
RAW = Path("data", "raw")  # the folder that DVC tracks: a change in it reruns the pipeline
CHUNK = 1 << 20  # bytes of a file, or characters of a named corpus, read at a time


@dataclass(frozen=True)
class Corpus:
    name: str  # as in NAMED, or the path under the project's root, in printable characters
    characters: int
    train_characters: int  # so many at the start are for training, the others for validation
    read: Callable[[], Iterator[str]]

    def chunks(self) -> Iterator[str]:
        """The text from its start, in strings of at most CHUNK characters, none of them empty.

        Raises UserError when a file can no longer be read, or has another length than before.
        """
        left = self.characters
        for chunk in self.read():
            left -= len(chunk)
            yield chunk
        if left:
            raise UserError(f"{self.name} changed while it was read: run the same command again")


def read(name: str, validation_fraction: float, root: Path) -> Corpus:
    """Return the corpus called `name`, or the text at the path `name` under root/data/raw.

    A file is taken as it is but for a byte-order mark; a folder is its .txt files, at any depth,
    joined in the order of their paths. `validation_fraction` of the characters, at the end, are
    for validation. The named corpora all validate on the same text, the last tenth of
    tinyshakespeare, whatever validation_fraction says, so that their losses compare.

    Raises UserError, in one line, for a name or text that will not do.
    """
    if name in NAMED:
        return _named(name)
    path = _find(name, root)
    paths = _texts(path, root) if path.is_dir() else [path]
    shown = _show(path, root)
    characters, blank = 0, True
    for chunk in _read(paths, root):
        characters += len(chunk)
        blank = blank and chunk.isspace()
    if blank:
        raise UserError(f"{shown} holds no text: put some in, or set prepare.corpus to another")
    train = _share(characters, validation_fraction)
    if train in (0, characters):
        part = "validation" if train else "training"
        raise UserError(
            f"{shown}: of {characters} characters, prepare.validation_fraction "
            f"{validation_fraction} leaves none for {part}: change it, or take a longer text"
        )
    return Corpus(shown, characters, train, functools.partial(_read, paths, root))


def _named(name: str) -> Corpus:
    plays = shakespeare.plays()
    tiny = shakespeare.tinyshakespeare(plays)
    others = shakespeare.other_plays(plays) if name == "shakespeare" else ""
    text = others + tiny

    def read() -> Iterator[str]:
        return (text[place : place + CHUNK] for place in range(0, len(text), CHUNK))

    return Corpus(name, len(text), len(others) + _share(len(tiny), 0.1), read)


def _share(characters: int, validation_fraction: float) -> int:
    """How many of the characters are for training."""
    return int(characters * (1 - validation_fraction))


def _find(name: str, root: Path) -> Path:
    """The real path of a file or folder in data/raw; links are followed before it is judged."""
    try:
        path = (root / name).resolve(strict=True)
    except PermissionError as problem:
        raise _unreadable(_printable(name), problem) from None
    except (OSError, ValueError, RuntimeError):  # missing, a null byte, a loop of links
        own = [_show(path, root) for path in (root / RAW).rglob("[!.]*")]
        near = difflib.get_close_matches(name, [*NAMED, *own], n=1)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise UserError(
            f"prepare.corpus: '{_printable(name)}' is neither {' nor '.join(NAMED)}, "
            f"nor a path under {RAW}{hint}"
        ) from None
    _check_inside(path, _printable(name), root)
    return path


def _check_inside(path: Path, shown: str, root: Path) -> None:
    """UserError unless a real path lies in data/raw."""
    if not path.is_relative_to((root / RAW).resolve()):
        raise UserError(
            f"prepare.corpus: {shown} lies outside {RAW}, where DVC would not see it change: "
            f"copy it to {RAW} and give that path"
        )


def _show(path: Path, root: Path) -> str:
    """A path as messages and meta.json give it: from the project's root, with slashes."""
    for base in (root, root.resolve()):
        if path.is_relative_to(base):
            return _printable(path.relative_to(base).as_posix())
    inside = path.relative_to((root / RAW).resolve())  # data/raw is itself a link
    return _printable((RAW / inside).as_posix())


def _printable(name: str) -> str:
    """A name on one line: a file's may hold line ends, terminal codes and bytes that are no text.

    An absurdly long one loses its middle.
    """
    name = name if len(name) <= 300 else f"{name[:150]}...{name[-147:]}"
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in name)


def _texts(folder: Path, root: Path) -> list[Path]:
    """The .txt files of a folder, at any depth, in the order of their paths."""

    def fail(problem: OSError) -> NoReturn:  # else os.walk leaves out what it may not open
        raise _unreadable(_show(Path(problem.filename), root), problem) from None

    paths = sorted(
        (
            Path(place, name)
            for place, _, names in os.walk(folder, onerror=fail)
            for name in names
            if Path(name).suffix.lower() == ".txt"
        ),
        key=lambda path: path.relative_to(folder).as_posix(),
    )
    if not paths:
        raise UserError(f"{_show(folder, root)} holds no .txt file: put one in, or give a file")
    return paths


def _read(paths: list[Path], root: Path) -> Iterator[str]:
    """The files' texts, chunk by chunk; where one lacks a line end, the next is not glued to it."""
    last = "\n"
    for path in paths:
        if last != "\n":
            yield (last := "\n")
        for chunk in _read_file(path, root):
            yield chunk
            last = chunk[-1]


def _read_file(path: Path, root: Path) -> Iterator[str]:
    """The file's text, line ends and all, less a byte-order mark, chunk by chunk."""
    shown = _show(path, root)
    decoder = codecs.getincrementaldecoder("utf-8")()
    try:
        _check_inside(path.resolve(strict=True), shown, root)
        if not path.is_file():  # a pipe would be waited for, a device never ends
            raise OSError(errno.EINVAL, "it is no ordinary file")
        with path.open("rb") as file:
            block = b"the first is still to come"
            while block:
                begun, _ = decoder.getstate()  # the first bytes of a character
                start = file.tell() - len(begun)
                block = file.read(CHUNK)
                text = decoder.decode(block, final=not block)
                if start == 0:
                    text = text.removeprefix("\ufeff")
                if text:
                    yield text
    except UnicodeDecodeError as problem:
        place = start + problem.start
        raise UserError(f"{shown} is not UTF-8 at byte {place}: save it as UTF-8") from None
    except RuntimeError:  # links in a circle, to Python before 3.13
        raise _unreadable(shown, OSError(errno.ELOOP, os.strerror(errno.ELOOP))) from None
    except OSError as problem:
        raise _unreadable(shown, problem) from None


def _unreadable(shown: str, problem: OSError) -> UserError:
    return UserError(
        f"{shown} cannot be read ({problem.strerror}): make it an ordinary, readable file, "
        "or set prepare.corpus to another"
    )
