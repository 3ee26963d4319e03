"""The source of the text: a named corpus, or the user's own file or folder under data/raw."""

import difflib
import errno
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from folio.corpus import folder, shakespeare
from folio.errors import UserError

# The named corpora. Each loader returns the text and the index at which its validation part begins.
NAMED: dict[str, Callable[[], tuple[str, int]]] = {
    "tinyshakespeare": shakespeare.load_tinyshakespeare,
    "shakespeare": shakespeare.load_all_plays,
    "tinyshakespeare-development": shakespeare.load_tinyshakespeare_development,
    "shakespeare-development": shakespeare.load_all_plays_development,
}
RAW = Path("data", "raw")  # tracked by DVC: a change in it reruns the pipeline
_IGNORED = ".ipynb_checkpoints"  # in .dvcignore


@dataclass(frozen=True)
class TextFile:
    path: str  # absolute, with symbolic links resolved
    name: str  # from the project's root, in printable characters
    kind: str  # txt; or jsonl or parquet, which contain documents
    compression: str  # gz, zst or ""
    size: int  # bytes
    modified: int  # ns since 1970


@dataclass(frozen=True)
class Corpus:
    name: str  # a key of NAMED, or the path from the project's root, in printable characters
    files: tuple[TextFile, ...] = ()  # in the order of their paths; none for a named corpus
    is_folder: bool = False
    left_out: tuple[str, ...] = ()  # of a folder: what is not read, relative to it

    @property
    def has_documents(self) -> bool:
        """Whether the corpus consists of documents. Otherwise, it is one running text."""
        return any(file.kind != "txt" for file in self.files)

    @property
    def size(self) -> int:
        """The size of all files in bytes."""
        return sum(file.size for file in self.files)


def find(name: str, root: Path) -> Corpus:
    """Return the named corpus, or that of the file or folder `name` under root/data/raw. Does not
    read its text.

    A single file is read as its suffix says, and as .txt if that is not one of those in a folder.
    Of a folder, the files that folder.find_texts returns are read. Raises UserError if there is no
    such corpus, or if a file in it cannot be read.
    """
    if name in NAMED:
        return Corpus(name)
    path = _resolve(name, root)
    display_name = _display_path(path, root)
    if not path.is_dir():
        return Corpus(display_name, (_describe(path, root),))
    paths, left_out = _find_texts(path, root)
    texts = tuple(_describe(each, root) for each in paths)
    return Corpus(display_name, texts, True, tuple(map(printable, left_out)))


def check_exists(name: str, root: Path) -> None:
    """Raise UserError unless `name` is a corpus that `find` may accept."""
    if name not in NAMED:
        _resolve(name, root)


def _describe(path: Path, root: Path) -> TextFile:
    """Raises UserError unless the file is a regular file in data/raw."""
    display_name = _display_path(path, root)
    try:
        real = path.resolve(strict=True)
        _check_inside(real, display_name, root)
        if not real.is_file():  # reading a pipe could block forever, a device may be endless
            raise OSError(errno.EINVAL, "it is not a regular file")
        stat = real.stat()
    except RuntimeError:  # a cycle of symbolic links, before Python 3.13
        raise unreadable(display_name, "Too many levels of symbolic links") from None
    except OSError as error:
        raise unreadable(display_name, error.strerror) from None
    if folder.is_packed(path.name):
        raise UserError(
            f"{display_name}: decompress it; only .txt and .jsonl files may be compressed, as .gz"
            " or .zst"
        )
    kind, compression = folder.kind_of(path.name) or ("txt", "")
    if kind == "parquet" and compression:
        raise UserError(
            f"{display_name}: decompress it, as .parquet files are compressed inside and must be"
            " readable at any place"
        )
    return TextFile(str(real), display_name, kind, compression, stat.st_size, stat.st_mtime_ns)


def _resolve(name: str, root: Path) -> Path:
    """Return the real path, with symbolic links resolved, of a file or folder in data/raw."""
    try:
        path = (root / name).resolve(strict=True)
    except PermissionError as error:
        raise unreadable(printable(name), error.strerror) from None
    except (OSError, ValueError, RuntimeError):  # missing, a null byte, a cycle of links
        prefix = f"{RAW.as_posix()}/"  # alone, it makes all names similar
        texts = [_display_path(path, root) for path in (root / RAW).rglob("[!.]*")]
        names = {text.removeprefix(prefix): text for text in [*texts, *NAMED]}
        similar = difflib.get_close_matches(name.removeprefix(prefix), names, n=1)
        hint = f"; did you mean {names[similar[0]]}?" if similar else ""
        raise UserError(
            f"prepare.corpus: '{printable(name)}' is neither {' nor '.join(NAMED)} "
            f"nor a path under {RAW}{hint}"
        ) from None
    _check_inside(path, printable(name), root)
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
            return printable(path.relative_to(base).as_posix())
    inside = path.relative_to((root / RAW).resolve())  # data/raw itself is a symbolic link
    return printable((RAW / inside).as_posix())


def printable(name: str, most: int = 300) -> str:
    """Return a file name as one printable line.

    Line breaks, terminal control codes and undecodable bytes are escaped. A name of more than
    `most` characters is shortened in the middle.
    """
    half = most // 2
    name = name if len(name) <= most else f"{name[:half]}...{name[3 - half :]}"
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in name)


def _find_texts(path: Path, root: Path) -> tuple[list[Path], list[str]]:
    """Like folder.find_texts, but raises UserError."""
    name = _display_path(path, root)
    try:
        texts, left_out = folder.find_texts(path)
    except OSError as error:
        name = _display_path(Path(error.filename), root)
        raise unreadable(name, error.strerror) from None
    if not texts:
        but = f" ({printable(left_out[0])} is left out)" if left_out else ""
        raise UserError(
            f"{name} contains no .txt, .jsonl or .parquet file to be read{but}: add one, or choose"
            " another prepare.corpus"
        )
    return texts, left_out


def unreadable(display_name: str, problem: str | None) -> UserError:
    return UserError(
        f"{display_name} cannot be read ({problem}): make it a readable regular file, or "
        "choose another prepare.corpus"
    )
