"""Where text comes from: a named corpus, or the user's own file or folder under data/raw."""

import difflib
from dataclasses import dataclass
from pathlib import Path

from folio import shakespeare
from folio.errors import UserError

NAMED = ("tinyshakespeare", "shakespeare")
RAW = Path("data", "raw")  # the folder that DVC tracks: a change in it reruns the pipeline


@dataclass(frozen=True)
class Corpus:
    name: str  # as in NAMED, or the path under the project's root
    train: str
    val: str  # what follows train in the text


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
    text = _read_folder(path, root) if path.is_dir() else _read_file(path, root)
    shown = _show(path, root)
    if not text.strip():
        raise UserError(f"{shown} holds no text: put some in, or set prepare.corpus to another")
    train, val = _split(text, validation_fraction)
    if not train or not val:
        part = "validation" if train else "training"
        raise UserError(
            f"{shown}: of {len(text)} characters, prepare.validation_fraction "
            f"{validation_fraction} leaves none for {part}: change it, or take a longer text"
        )
    return Corpus(shown, train, val)


def _named(name: str) -> Corpus:
    plays = shakespeare.plays()
    train, val = _split(shakespeare.tinyshakespeare(plays), 0.1)
    if name == "shakespeare":
        train = shakespeare.other_plays(plays) + train
    return Corpus(name, train, val)


def _split(text: str, validation_fraction: float) -> tuple[str, str]:
    cut = int(len(text) * (1 - validation_fraction))
    return text[:cut], text[cut:]


def _find(name: str, root: Path) -> Path:
    """The real path of a file or folder in data/raw; links are followed before it is judged."""
    try:
        path = (root / name).resolve(strict=True)
    except (OSError, ValueError, RuntimeError):  # missing, a null byte, a loop of links
        own = [_show(path, root) for path in (root / RAW).rglob("[!.]*")]
        near = difflib.get_close_matches(name, [*NAMED, *own], n=1)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise UserError(
            f"prepare.corpus: {name!r} is neither {' nor '.join(NAMED)}, "
            f"nor a path under {RAW}{hint}"
        ) from None
    _check_inside(path, name, root)
    return path


def _check_inside(path: Path, name: str, root: Path) -> None:
    if not path.resolve().is_relative_to((root / RAW).resolve()):
        raise UserError(
            f"prepare.corpus: {name} lies outside {RAW}, where DVC would not see it change: "
            f"copy it to {RAW} and give that path"
        )


def _show(path: Path, root: Path) -> str:
    """A path as messages and meta.json give it: from the project's root, with slashes."""
    for base in (root, root.resolve()):
        if path.is_relative_to(base):
            return path.relative_to(base).as_posix()
    return (RAW / path.relative_to((root / RAW).resolve())).as_posix()  # data/raw is itself a link


def _read_folder(folder: Path, root: Path) -> str:
    files = sorted(
        (path for path in folder.rglob("*") if path.suffix.lower() == ".txt" and path.is_file()),
        key=lambda path: path.relative_to(folder).as_posix(),
    )
    if not files:
        raise UserError(f"{_show(folder, root)} holds no .txt file: put one in, or give a file")
    text = ""
    for file in files:
        _check_inside(file, _show(file, root), root)
        if text and not text.endswith("\n"):
            text += "\n"
        text += _read_file(file, root)
    return text


def _read_file(path: Path, root: Path) -> str:
    """The file's text, line ends and all, less a byte-order mark."""
    try:
        return path.read_bytes().decode("utf-8").removeprefix("\ufeff")
    except UnicodeDecodeError as problem:
        raise UserError(
            f"{_show(path, root)} is not UTF-8 at byte {problem.start}: save it as UTF-8"
        ) from None
    except OSError as problem:
        raise UserError(
            f"{_show(path, root)} cannot be read ({problem.strerror}): check its permissions"
        ) from None
