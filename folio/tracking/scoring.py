"""The server behind `python -m folio serve`: MLflow's scoring server, and checks around it.

Checks the Host header and the content of each request, and reduces each error to one line: MLflow's
own error messages contain stack traces and paths.
"""

import argparse
import json
import sys
from collections.abc import Awaitable, Callable, MutableMapping, Sequence
from typing import Any

import mlflow
import uvicorn
from mlflow.pyfunc import PyFuncModel, scoring_server
from mlflow.types import DataType

from folio import loopback
from folio.errors import UserError, one_line_errors
from folio.tracking.failures import first_line
from folio.tracking.scoring_request import MAX_BODY, RefusedError, normalize
from folio.tracking.store import STORE_ERRORS

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Message, Receive, Send], Awaitable[None]]

_INTERNAL = "the model failed; the server's output has the details"


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", required=True)
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--allow-host", action="append", default=[])
    options = parser.parse_args()
    allowed = loopback.parse_hosts(options.allow_host)
    app = Checked(_load(options.model), allowed)
    uvicorn.run(app, host=loopback.HOST, port=options.port)


def _load(uri: str) -> PyFuncModel:
    """Load a model with the code that is stored with it. Raises UserError if that fails."""
    # Otherwise Python would use the modules of this folio, which may be of another version.
    for name in [*sys.modules]:
        if name.partition(".")[0] == "folio":
            del sys.modules[name]
    try:
        return mlflow.pyfunc.load_model(uri)
    except Exception as error:
        # The model's code has a UserError of its own.
        if isinstance(error, STORE_ERRORS) or type(error).__name__ == "UserError":
            raise UserError(f"{uri} cannot be loaded: {first_line(error)}") from None
        raise


class Checked:
    """An ASGI app: MLflow's server for a model, behind the checks."""

    def __init__(self, model: PyFuncModel, allowed: Sequence[str]):
        """allowed: the host names, besides those of this machine, that the server answers to."""
        self._app: App = scoring_server.init(model)
        self._allowed = allowed
        schema = model.metadata.get_params_schema()
        self._types: dict[str, type] = {
            each.name: int if each.dtype in (DataType.long, DataType.integer) else float
            for each in (schema.params if schema else [])
        }

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
        elif scope["type"] == "http":  # there are no WebSockets
            if not loopback.is_allowed(scope["headers"], self._allowed):
                problem = f"this server does not accept that Host header: {loopback.HINT}"
                await _respond(send, 403, problem)
            elif scope["path"] == "/invocations" and scope["method"] == "POST":
                await self._invoke(scope, receive, send)
            else:
                await self._app(scope, receive, send)

    async def _invoke(self, scope: Message, receive: Receive, send: Send) -> None:
        headers = dict(scope["headers"])
        try:
            content_type = headers.get(b"content-type", b"").decode("latin-1")
            body = normalize(await _read(receive), content_type, self._types)
        except RefusedError as problem:
            await _respond(send, problem.status, str(problem))
            return
        length = str(len(body)).encode()
        others = [pair for pair in scope["headers"] if pair[0] not in _REPLACED]
        new = [(b"content-type", b"application/json"), (b"content-length", length)]
        messages = [{"type": "http.request", "body": body, "more_body": False}]

        async def receive_body() -> Message:
            return messages.pop() if messages else await receive()

        await self._app({**scope, "headers": others + new}, receive_body, _OneLineErrors(send))


_REPLACED = (b"content-type", b"content-length", b"transfer-encoding")


class _OneLineErrors:
    """Sends a response; if it is an error, its message is reduced to one line."""

    def __init__(self, send: Send):
        self._send, self._status, self._body = send, 0, b""

    async def __call__(self, message: Message) -> None:
        if message["type"] == "http.response.start" and message["status"] >= 400:
            self._status = message["status"]
        elif not self._status:
            await self._send(message)
        elif message["type"] == "http.response.body":
            self._body += message.get("body", b"")
            if not message.get("more_body"):
                await _respond(self._send, *_one_line(self._status, self._body))


def _one_line(status: int, body: bytes) -> tuple[int, str]:
    """The status and the message of an error from MLflow's server."""
    text = body.decode("utf-8", "replace")
    try:
        error = json.loads(text)
        text = str(error["message"])
    except (ValueError, KeyError, TypeError):
        return status, _line(text)
    if "stack_trace" in error or status >= 500:  # an unexpected exception in the model
        print(error.get("stack_trace", text), file=sys.stderr, flush=True)
        return 500, _INTERNAL
    return status, _line(text.rpartition("\nError: ")[2])  # before that, it quotes the request


def _line(text: str) -> str:
    return "".join(c for c in " ".join(text.split())[:300] if c.isprintable())


async def _read(receive: Receive) -> bytes:
    """The body of a request. Raises RefusedError if it is too large or incomplete."""
    body, more = bytearray(), True
    while more:  # to the end, because many clients read no response before they have sent it all
        message = await receive()
        if message["type"] != "http.request":
            raise RefusedError("the request ended early")
        if len(body) <= MAX_BODY:
            body += message.get("body", b"")
        more = message.get("more_body", False)
    if len(body) > MAX_BODY:
        raise RefusedError(f"a request may have at most {MAX_BODY:,} bytes", 413)
    return bytes(body)


async def _respond(send: Send, status: int, problem: str) -> None:
    """Send an error in MLflow's format."""
    code = "INVALID_PARAMETER_VALUE" if status < 500 else "INTERNAL_ERROR"
    body = json.dumps({"error_code": code, "message": problem}).encode()
    headers = [
        (b"content-type", b"application/json"),
        (b"content-length", str(len(body)).encode()),
    ]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})


if __name__ == "__main__":
    with one_line_errors():
        main()
