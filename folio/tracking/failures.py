"""The failures of an MLflow store, each explained in one line with a hint."""

import contextlib
import re
import shlex
import sqlite3
from pathlib import Path

from sqlalchemy import make_url
from sqlalchemy.exc import ArgumentError, OperationalError

from folio.errors import UserError, disk_hint
from folio.tracking import local_store

SYNC = "`python -m folio sync`"
URIS = "sqlite:///FILE, http://HOST:PORT or postgresql+psycopg2://HOST/DATABASE"

# The package that provides a database driver, if its name is not that of the module.
_PACKAGES = {"MySQLdb": "mysqlclient"}

# What SQLite reports, and what it means for the store at {path}.
_DAMAGED = "malformed|not a database|encrypted|I/O error|corrupt|no such table"
_SQLITE = {
    _DAMAGED: "{path} is damaged: {rebuild}",
    "locked": "{path} is in use by another process: try again when that has finished",
    "readonly": "{path} cannot be written: make the file and its folder writable",
    "unable to open": "{path} cannot be opened: check its permissions and those of its folder",
    "disk is full": "the disk of {path} is full: free some space",
}
_DISCONNECTED = (
    r"Connection reset by peer|Broken pipe|Remote end closed connection without response"
    r"|server closed the connection unexpectedly"
)
_NETWORK = re.compile(
    rf"\[Errno -?\d+\] ([A-Z][^'\")]+)|(timed out)|(Connection refused)|({_DISCONNECTED})"
)
# A response that is not from MLflow but from a proxy, or from another server.
_RESPONSE = re.compile(r"error code (\d+) != 200|too many (\d+) error|not in a valid JSON format")


def explain(problem: BaseException, uri: str) -> str:
    """A failure of the store at `uri` in one line, with a hint if its cause is known."""
    line = _mask_passwords(first_line(problem))
    if isinstance(problem, UserError):
        return line
    if isinstance(problem, ImportError) and problem.name:
        package = _PACKAGES.get(problem.name, problem.name)
        return f"the Python package {package} is missing: `pip install {package}`"
    if isinstance(problem, OSError):
        hint = disk_hint(problem)
        return f"{hint}, then {SYNC} sends the rest" if hint else line
    if path := local_store.path_of(uri):
        for pattern, meaning in _SQLITE.items():
            if re.search(pattern, line):
                return meaning.format(path=path, rebuild=_rebuild(path))
        return line
    if "unsupported URI" in line or "Can't load plugin" in line:
        return f"{without_password(uri)} is not the URI of an MLflow store: use {URIS}"
    if response := _RESPONSE.search(str(problem)):
        status = response[1] or response[2]
        hint = "check the login" if status in ("401", "403") else "check the address and the server"
        answer = f"responded with status {status}" if status else "is not an MLflow server"
        return f"{without_password(uri)} {answer}: {hint}"
    reason = _NETWORK.search(str(problem))
    if reason or isinstance(problem, OperationalError):
        text = next(filter(None, reason.groups())).strip() if reason else line
        hint = "check the address, the login and the server"
        return f"{without_password(uri)} cannot be reached ({text}): {hint}"
    return line


def is_disconnected(problem: BaseException) -> bool:
    """Whether the server closed the connection instead of responding."""
    return re.search(_DISCONNECTED, str(problem)) is not None


def check_uri(uri: str) -> None:
    """Raise UserError if MLflow could not open a store at the URI, or if a local store is empty or
    is not a file."""
    if path := local_store.path_of(uri):
        if "/" in uri.partition("?")[2]:
            raise UserError(f"{uri}: '?' ends the path in a URI: rename the folder")
        if path.is_dir():
            move = _rebuild(path, "moved")
            raise UserError(f"{path} is a folder, but MLflow needs a file there: {move}")
        return
    shown = without_password(uri)
    try:
        url = make_url(uri)
    except ArgumentError:
        return  # a folder, or a name such as databricks, which MLflow checks
    except ValueError as error:
        raise UserError(f"{shown} is not a valid URI ({error}): use {URIS}") from None
    if url.drivername.startswith("sqlite") and url.database in (None, "", ":memory:"):
        raise UserError(f"{shown} does not name a file: use sqlite:///mlflow.db, for example")
    if url.drivername.partition("+")[0] in ("postgresql", "mysql", "mssql"):
        _check_driver(uri, shown)


def check_content(uri: str) -> None:
    """Raise UserError if a local store is empty, as after a power failure, or damaged."""
    path = local_store.path_of(uri)
    if path is None or not path.is_file():
        return
    if local_store.is_empty(path):
        raise UserError(f"{path} is empty: {SYNC} fills it with the runs in DVC's cache")
    with contextlib.closing(sqlite3.connect(f"{path.as_uri()}?mode=ro", uri=True)) as database:
        try:
            [[result]] = database.execute("PRAGMA quick_check(1)").fetchall()
        except sqlite3.Error as problem:
            raise UserError(explain(problem, uri)) from None
    if result != "ok":
        raise UserError(f"{path} is damaged: {_rebuild(path)}")


def without_password(uri: str) -> str:
    """The URI, with a password replaced by ***, and without a query, which may have a token."""
    uri = uri.partition("?")[0] if uri.startswith("http") else uri
    return _mask_passwords(uri)


def _mask_passwords(text: str) -> str:
    return re.sub(r"(://[^/@:\s]*):[^/@\s]*@", r"\1:***@", text)


def first_line(problem: BaseException) -> str:
    """The first line of an exception's message."""
    text = str(problem).strip()
    return text.splitlines()[0] if text else repr(problem)


def _check_driver(uri: str, shown: str) -> None:
    try:
        make_url(uri).get_dialect().import_dbapi()
    except ImportError as error:
        name = error.name or str(error)
        hint = f"`pip install {_PACKAGES.get(name, name)}`"
        if name in ("psycopg", "psycopg2"):
            hint = "write postgresql+psycopg2://, and install its driver with `make .venv/server`"
        raise UserError(
            f"{shown} needs the Python package {_PACKAGES.get(name, name)}: {hint}"
        ) from None
    except Exception as error:  # there is no such dialect
        raise UserError(f"{shown} is not the URI of an MLflow store: use {URIS}") from error


def _rebuild(path: Path, suffix: str = "damaged") -> str:
    old, new = shlex.quote(str(path)), shlex.quote(f"{path}.{suffix}")
    return f"`mv {old} {new}`, then {SYNC} makes it again from DVC's cache"
