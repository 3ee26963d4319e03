"""MLflow stores that cannot be opened or are damaged: one line with the cause and a remedy."""

import errno
import os
import shutil
import socket
import sqlite3
import struct
import threading
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from conftest import open_store
from mlflow.exceptions import MlflowException

from folio.errors import UserError
from folio.tracking import failures, queries, store, sync
from folio.tracking.store import STORE_ERRORS, Store, warn_on_failure

# A URI, and words of the error. None of them can be opened, wherever the tests run.
URIS = {
    "postgresql://ada:secret@localhost/x": r"write postgresql\+psycopg2://, and install",
    "postgresql+pg8000://x/y": "needs the Python package pg8000: `pip install pg8000`",
    "mysql://ada:secret@host/x": "needs the Python package mysqlclient: `pip install mysqlclient`",
    "mssql://host/x": "needs the Python package pyodbc: `pip install pyodbc`",
    "postgresql+nothing://x/y": "is not the URI of an MLflow store: use sqlite:///FILE",
    "postgres://x/y": "is not the URI of an MLflow store: use sqlite:///FILE",
    "foo://bar": "is not the URI of an MLflow store: use sqlite:///FILE",
    "s3://bucket/x": "is not the URI of an MLflow store: use sqlite:///FILE",
    "localhost:5000": "is not the URI of an MLflow store: use sqlite:///FILE",
    "http://127.0.0.1:port": "is not a valid URI",
    "http://[::1": "is not a valid URI",
    "sqlite://": "does not name a file: use sqlite:///mlflow.db",
    "sqlite:///:memory:": "does not name a file: use sqlite:///mlflow.db",
    "SQLITE:///mlflow.db": "is not the URI of an MLflow store: use sqlite:///FILE",
    "sqlite:////tmp": "is a folder, but MLflow needs a file there: `mv ",
    "http://127.0.0.1:9": r"cannot be reached \(Connection refused\): check the address",
    "http://no-such-host.invalid": r"cannot be reached \(.*\): check the address",
    "postgresql+psycopg2://ada:secret@127.0.0.1:9/x": r"cannot be reached .*: check the address",
    "postgresql+psycopg2:///x?host=/nowhere": r"cannot be reached .*: check the address",
}


@pytest.fixture
def project(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("DVC_ROOT", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    return tmp_path


@pytest.mark.parametrize("uri", URIS)
def test_store_that_cannot_be_opened_is_one_line_with_a_remedy(project, monkeypatch, capsys, uri):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    started = time.monotonic()
    with pytest.raises(UserError, match=URIS[uri]) as error:
        Store.existing(None)
    assert "\n" not in str(error.value) and "secret" not in str(error.value)
    capsys.readouterr()
    with warn_on_failure():  # as in a training, which continues
        Store(None)
    [line, incomplete] = capsys.readouterr().err.splitlines()
    assert line.startswith("MLflow failed, continuing without it: ") and "secret" not in line
    assert incomplete == store.INCOMPLETE
    assert time.monotonic() - started < 30


@pytest.mark.parametrize(
    ("status", "body", "words"),
    [
        (401, "", "responded with status 401: check the login"),
        (404, "<html>", "responded with status 404: check the address and the server"),
        (503, "", "responded with status 503: check the address and the server"),
        (200, "<html>", "is not an MLflow server: check the address and the server"),
    ],
)
def test_response_of_another_server_is_one_line_with_its_address(project, status, body, words):
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(status)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body.encode())

        def log_message(self, *_):
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        uri = f"http://127.0.0.1:{server.server_port}"
        with pytest.raises(UserError) as error:
            Store.existing(uri)
        server.shutdown()
    assert str(error.value) == f"MLflow failed: {uri} {words}"


@pytest.mark.parametrize("reset", [True, False])
def test_request_on_a_connection_that_the_server_closes_is_sent_again(project, reset):
    requests = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            requests.append(self.path)
            if len(requests) > 1:
                return self.send_error(503)
            if reset:  # without the normal end of a connection
                linger = struct.pack("ii", 1, 0)
                self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
            self.close_connection = True

        def log_message(self, *_):
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.shutdown_request = server.close_request  # which would end the connection normally
        threading.Thread(target=server.serve_forever, daemon=True).start()
        uri = f"http://127.0.0.1:{server.server_port}"
        with pytest.raises(UserError, match="responded with status 503"):
            sync.run(uri, project)
        assert len(requests) == 2
        requests.clear()
        with pytest.raises(UserError, match=rf"^MLflow failed: {uri} cannot be reached \(\w.* \w"):
            Store.existing(uri)
        server.shutdown()


def test_missing_package_of_an_artifact_store_is_a_failure_of_the_store():
    error = ModuleNotFoundError("No module named 'boto3'", name="boto3")
    assert isinstance(error, STORE_ERRORS)
    text = failures.explain(error, "http://x")
    assert text == "the Python package boto3 is missing: `pip install boto3`"


@pytest.mark.parametrize(
    ("uri", "shown"),
    [
        ("postgresql://ada:secret@host/x", "postgresql://ada:***@host/x"),
        ("http://ada@host:5000", "http://ada@host:5000"),
        ("http://host:5000/@x", "http://host:5000/@x"),
        ("sqlite:///mlflow.db", "sqlite:///mlflow.db"),
    ],
)
def test_password_is_not_shown(uri, shown):
    assert failures.without_password(uri) == shown


def test_password_in_the_message_of_a_failure_is_not_shown():
    url = "http://ada:secret@host:5000/api"
    for error in (
        MlflowException(f"request to {url} failed"),
        OSError(f"500 Error for url: {url}"),
    ):
        text = failures.explain(error, "http://ada:secret@host:5000")
        assert "secret" not in text and "http://ada:***@host:5000/api" in text


def test_path_that_ends_in_the_middle_of_a_uri_is_rejected(project):
    with pytest.raises(UserError, match=r"'\?' ends the path in a URI: rename the folder"):
        Store(f"sqlite:///{project}/what?/mlflow.db")
    assert list(project.iterdir()) == []


# --- a damaged mlflow.db


def cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def overwrite(path: Path) -> None:
    with path.open("rb+") as file:
        file.seek(3 * 4096)
        file.write(os.urandom(20 * 4096))


def empty(path: Path) -> None:
    os.truncate(path, 0)
    long_ago = time.time() - 3600
    os.utime(path, (long_ago, long_ago))


def replace(path: Path) -> None:
    path.unlink()
    path.mkdir()


DAMAGES: dict[str, tuple[Callable[[Path], None], str]] = {
    "cut": (cut, "is damaged: `mv "),
    "overwritten": (overwrite, "is damaged: `mv "),
    "no database": (lambda path: path.write_text("no database " * 100), "is damaged: `mv "),
    "empty": (empty, "is empty: `python -m folio sync`"),
    "folder": (replace, "is a folder, but MLflow needs a file there: `mv "),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_store_is_one_line_with_a_remedy(project, empty_store, damage):
    database = project / "mlflow.db"
    shutil.copy(empty_store, database)
    damaging, words = DAMAGES[damage]
    damaging(database)
    with pytest.raises(UserError) as error:
        failures.check_uri("sqlite:///mlflow.db")
        failures.check_content("sqlite:///mlflow.db")
    assert str(error.value).startswith(f"{database} ") and words in str(error.value)
    assert "\n" not in str(error.value)
    if damage in ("cut", "no database", "empty", "folder"):  # otherwise it depends on the query
        with pytest.raises(UserError, match=words):
            Store.existing(None)


def test_store_replaces_an_empty_file(project):
    (project / "mlflow.db").touch()
    empty(project / "mlflow.db")
    assert queries.list_runs(Store(None)) == []
    failures.check_content("sqlite:///mlflow.db")


def test_check_content_finds_damage_that_no_query_meets(project, empty_store):
    database = project / "mlflow.db"
    shutil.copy(empty_store, database)
    failures.check_content("sqlite:///mlflow.db")
    with sqlite3.connect(database) as connection:
        connection.execute("CREATE TABLE more (text)")
        connection.executemany("INSERT INTO more VALUES (?)", [("x" * 4000,)] * 50)
    connection.close()
    os.truncate(database, database.stat().st_size - 8192)
    with pytest.raises(UserError, match=r"mlflow.db is damaged: `mv .*mlflow.db.damaged`, then"):
        failures.check_content("sqlite:///mlflow.db")


def test_store_in_use_is_not_called_damaged(project, empty_store, monkeypatch):
    shutil.copy(empty_store, project / "mlflow.db")
    open_store(project)
    problem = sqlite3.OperationalError("database is locked")
    text = failures.explain(problem, "sqlite:///mlflow.db")
    assert "is in use by another process: try again" in text and "damaged" not in text


def test_file_in_place_of_mlruns_is_reported(project):
    (project / "mlruns").write_text("")
    problem = NotADirectoryError(errno.ENOTDIR, "Not a directory", str(project / "mlruns/a/b"))
    assert failures.explain(problem, "sqlite:///mlflow.db") == (
        f"{project / 'mlruns'} is a file where Folio needs a folder: move it elsewhere,"
        " then `python -m folio sync` sends the rest"
    )
