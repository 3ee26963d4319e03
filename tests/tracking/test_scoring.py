"""The checks around MLflow's scoring server: hosts, sizes, and errors of one line."""

import asyncio
import json
from typing import Any

import pytest

from folio.inference.params import PARAMS
from folio.tracking import scoring
from folio.tracking.scoring_request import MAX_BODY


class Server:
    """An app in place of MLflow's, which records its requests and always sends this response."""

    def __init__(self, status: int = 200, body: bytes = b'{"predictions": ["a"]}'):
        self.status, self.body, self.requests = status, body, []

    async def __call__(self, scope, receive, send) -> None:
        received, more = b"", scope["type"] == "http"
        while more:
            message = await receive()
            received, more = received + message["body"], message.get("more_body")
        self.requests.append((scope, received))
        await send({"type": "http.response.start", "status": self.status, "headers": []})
        half = len(self.body) // 2
        await send({"type": "http.response.body", "body": self.body[:half], "more_body": True})
        await send({"type": "http.response.body", "body": self.body[half:]})


def ask(
    server: Server,
    body: bytes = b'{"inputs": ["KING"]}',
    path: str = "/invocations",
    method: str = "POST",
    allowed: tuple[str, ...] = (),
    chunks: list[dict[str, Any]] | None = None,
    **headers: str,
) -> tuple[int, str]:
    """The status and the body of the checked server's response."""
    checked = scoring.Checked.__new__(scoring.Checked)
    checked._app, checked._allowed = server, allowed
    checked._types = {name: type(value) for name, value in PARAMS.items()}
    known = {"host": "127.0.0.1:5001", "content_type": "application/json"}
    raw = [(k.replace("_", "-").encode(), v.encode()) for k, v in (known | headers).items() if v]
    scope = {"type": "http", "method": method, "path": path, "headers": raw}
    messages = chunks or [{"type": "http.request", "body": body, "more_body": False}]
    sent: list[dict[str, Any]] = []

    async def receive():
        return messages.pop(0)

    async def send(message):
        sent.append(message)

    asyncio.run(checked(scope, receive, send))
    assert [each["type"] for each in sent][:1] == ["http.response.start"]
    return sent[0]["status"], b"".join(each.get("body", b"") for each in sent[1:]).decode()


def message(response: tuple[int, str]) -> str:
    """The message of an error; it is one line."""
    error = json.loads(response[1])
    assert error.keys() == {"error_code", "message"}
    assert error["message"].isprintable() and 0 < len(error["message"]) <= 300
    return error["message"]


def test_request_is_passed_on_with_its_prompts_and_params():
    server = Server()
    response = ask(server, b'{"inputs": ["KING"], "params": {"tokens": 3}}', content_length="45")
    assert response == (200, '{"predictions": ["a"]}')
    [(scope, body)] = server.requests
    assert json.loads(body) == {
        "dataframe_split": {"columns": ["prompt"], "data": [["KING"]]},
        "params": {"tokens": 3},
    }
    headers = dict(scope["headers"])
    assert headers[b"content-length"] == str(len(body)).encode()
    assert headers[b"content-type"] == b"application/json"


@pytest.mark.parametrize("path", ["/ping", "/invocations", "/version", "/docs"])
@pytest.mark.parametrize(
    "host", ["evil.example", "127.0.0.1.evil.example", "", "10.1.evil.example"]
)
def test_foreign_host_is_refused_on_every_path(path, host):
    server = Server()
    response = ask(server, path=path, host=host)
    assert response[0] == 403 and "allow the name with --allow-host" in message(response)
    assert server.requests == []


@pytest.mark.parametrize("host", ["localhost", "127.0.0.1:5001", "[::1]:5001", "box.example:80"])
def test_names_of_this_machine_and_allowed_names_are_answered(host):
    assert ask(Server(), host=host, allowed=("box.example",))[0] == 200


@pytest.mark.parametrize(("method", "path"), [("GET", "/ping"), ("GET", "/invocations")])
def test_other_requests_are_passed_on_unchanged(method, path):
    server = Server(405, b"not JSON")
    assert ask(server, b"x", path, method) == (405, "not JSON")
    assert server.requests[0][1] == b"x"


def test_refused_request_does_not_reach_mlflow():
    server = Server()
    response = ask(server, b'{"inputs": [null]}')
    assert response[0] == 400 and message(response) == "prompt 1 is null; it must be a string"
    assert ask(server, content_type="")[0] == 415
    assert server.requests == []


def test_large_request_is_read_to_its_end_and_refused():
    server = Server()
    half = {"type": "http.request", "body": b" " * (MAX_BODY // 2 + 1), "more_body": True}
    chunks = [half, half, half, half | {"more_body": False}]
    response = ask(server, chunks=chunks)
    assert response[0] == 413 and "at most 8,388,608 bytes" in message(response)
    assert server.requests == [] and chunks == []


def test_request_that_ends_early_is_refused():
    part = {"type": "http.request", "body": b'{"inputs"', "more_body": True}
    response = ask(Server(), chunks=[part, {"type": "http.disconnect"}])
    assert response[0] == 400 and message(response) == "the request ended early"


TRACE = 'Traceback (most recent call last):\n  File "/home/ada/folio/x.py", line 3\nKeyError: 1\n'


@pytest.mark.parametrize(
    ("status", "body", "expected"),
    [
        (
            400,
            {"error_code": "X", "message": "Failed to predict data '  a\n0 KING'. \nError: top_p"},
            (400, "top_p"),
        ),
        (400, {"message": "one\ntwo\r\n three\x1b[31m"}, (400, "one two three[31m")),
        (400, {"message": "long" * 1_000}, (400, ("long" * 75))),
        (400, {"message": "oh", "stack_trace": TRACE}, (500, scoring._INTERNAL)),
        (500, {"message": TRACE}, (500, scoring._INTERNAL)),
        (504, "Request processing time\nexceeded", (504, "Request processing time exceeded")),
        (422, {"detail": "x"}, (422, '{"detail": "x"}')),
        (400, [1], (400, "[1]")),
    ],
)  # fmt: skip
def test_errors_of_mlflow_become_one_line(status, body, expected, capsys):
    content = body if isinstance(body, str) else json.dumps(body)
    response = ask(Server(status, content.encode()))
    assert (response[0], message(response)) == expected
    assert "/home" not in response[1] and "Traceback" not in response[1]
    internal = expected[1] == scoring._INTERNAL
    assert ("KeyError: 1" in capsys.readouterr().err) == internal  # for who runs the server


def test_websockets_are_not_answered():
    checked = scoring.Checked.__new__(scoring.Checked)
    checked._app = None
    asyncio.run(checked({"type": "websocket", "path": "/"}, None, None))


def test_lifespan_is_passed_on():
    checked, server = scoring.Checked.__new__(scoring.Checked), Server()
    checked._app = server

    async def send(message):
        pass

    asyncio.run(checked({"type": "lifespan"}, None, send))
    assert server.requests
