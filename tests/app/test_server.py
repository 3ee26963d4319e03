"""Which requests the server refuses, and the ports that it cannot use."""

import asyncio
import socket
from typing import Any

import pytest

from folio.errors import UserError


@pytest.fixture(scope="module")
def server() -> Any:
    """Imported here because Gradio takes seconds to import."""
    from folio.app import server

    return server


def respond(
    server: Any, method: str, path: str, headers: dict[str, str], *allowed: str
) -> dict[str, Any]:
    """The start of the guarded server's response to a request."""
    sent: list[dict[str, Any]] = []

    async def app(scope, receive, send):
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b""})

    async def send(message):
        sent.append(message)

    known = {"host": "127.0.0.1:7860"} | headers
    raw = [(name.encode(), value.encode()) for name, value in known.items()]
    scope = {"type": "http", "method": method, "path": path, "headers": raw}
    asyncio.run(server.Guard(app, allowed)(scope, None, send))
    return sent[0]


@pytest.mark.parametrize("path", ["/", "/config", "/assets/x.js", "/gradio_api/queue/data"])
def test_guard_passes_the_paths_of_the_page_with_a_content_security_policy(server, path):
    start = respond(server, "GET", path, {})
    assert start["status"] == 200
    assert dict(start["headers"])[b"content-security-policy"].startswith(b"default-src 'self'")


@pytest.mark.parametrize("path", ["/gradio_api/file=/etc/passwd", "/gradio_api/upload", "/x"])
def test_guard_refuses_every_other_path(server, path):
    start = respond(server, "GET", path, {})
    assert start["status"] == 404
    assert b"content-security-policy" in dict(start["headers"])


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"content-length": "65536"}, 200),
        ({"content-length": "65537"}, 413),
        ({"content-length": "-1"}, 411),
        ({}, 411),
    ],
)
def test_guard_limits_the_size_of_a_request(server, headers, status):
    assert respond(server, "POST", "/gradio_api/queue/join", headers)["status"] == status


def test_guard_closes_websockets(server):
    async def app(scope, receive, send):
        raise AssertionError("the request was passed on")

    asyncio.run(server.Guard(app)({"type": "websocket", "path": "/"}, None, None))


def test_serve_reports_a_port_in_use_in_one_line(server):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(UserError, match=f"^port {port}: Address already in use; choose"):
            server.serve(server.build(), "127.0.0.1", port)


def test_serve_reports_an_invalid_port_in_one_line(server):
    with pytest.raises(UserError, match=r"^port 65536: choose one from 0 to 65535$"):
        server.serve(server.build(), "127.0.0.1", 65536)


@pytest.mark.parametrize("path", ["/", "/config", "/gradio_api/queue/data", "/gradio_api/upload"])
@pytest.mark.parametrize(
    "host", ["evil.example", "evil.example:7860", "127.0.0.1.evil.example", "10.evil.example", ""]
)
def test_guard_refuses_a_foreign_host_on_every_path(server, path, host):
    assert respond(server, "GET", path, {"host": host})["status"] == 403
    assert respond(server, "POST", path, {"host": host, "content-length": "1"})["status"] == 403


@pytest.mark.parametrize("host", ["localhost", "localhost:1234", "127.0.0.1", "[::1]:7860"])
def test_guard_answers_to_the_names_of_this_machine(server, host):
    assert respond(server, "GET", "/", {"host": host})["status"] == 200


def test_guard_answers_to_the_names_that_the_user_allows(server):
    assert respond(server, "GET", "/", {"host": "box.example:80"}, "box.example")["status"] == 200
    assert respond(server, "GET", "/", {"host": "other.example"}, "box.example")["status"] == 403


@pytest.mark.parametrize(
    ("host", "status"),
    [
        ("ada-folio.hf.space", 200),
        ("folio.ada.example", 200),  # SPACE_HOST
        ("10.20.1.2:7860", 200),  # a check of Hugging Face that the container is up
        ("localhost:7860", 200),
        ("evil.example", 403),
        ("hf.space.evil.example", 403),
    ],
)
def test_guard_answers_to_the_host_of_a_space(server, monkeypatch, host, status):
    monkeypatch.setattr(server, "IN_SPACE", True)
    monkeypatch.setenv("SPACE_HOST", "Folio.ada.example")
    assert respond(server, "GET", "/", {"host": host})["status"] == status
