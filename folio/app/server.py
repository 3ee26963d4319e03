"""The page's server: how it is started, and which requests it rejects."""

import argparse
import os
import socket
import threading
from collections.abc import MutableMapping, Sequence
from pathlib import Path
from typing import Any

import gradio as gr
from starlette.middleware import Middleware
from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Receive, Scope, Send

from folio import loopback, signals
from folio.app.models import IN_SPACE, PIPELINE, open_model
from folio.app.page import THEME, build
from folio.errors import UserError, report

MAX_REQUEST = 64 * 1024  # bytes; the longest prompt is 24 KB in JSON

# What the browser may load: only resources from this server, whatever generated text contains.
POLICY = (
    "default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval'; object-src 'none';"
    " style-src 'self' 'unsafe-inline'; img-src 'self' data:; font-src 'self' data:"
)
# The paths that the page requests. Gradio's other routes serve files or accept uploads.
PREFIXES = ("/assets/", "/static/", "/svelte/", "/gradio_api/queue/", "/gradio_api/heartbeat/")
PATHS = (
    *("/", "/config", "/theme.css", "/favicon.ico", "/manifest.json"),
    *(f"/gradio_api/{name}" for name in ("startup-events", "run/predict", "cancel", "reset")),
)


def main() -> None:
    parser = argparse.ArgumentParser(description="Serve the page for trying out a trained model.")
    parser.add_argument("--port", type=int, default=7860, help="port on 127.0.0.1 (default: 7860)")
    parser.add_argument(
        "--allow-host",
        action="append",
        default=[],
        metavar="NAME",
        help="also answer requests for this host name, such as that of a proxy (repeatable)",
    )
    options = parser.parse_args()
    allowed = loopback.parse_hosts(options.allow_host)
    try:
        open_model(PIPELINE)
    except UserError as problem:
        report(str(problem))
    # A Space sets GRADIO_SERVER_NAME and GRADIO_SERVER_PORT.
    host, port = (None, None) if IN_SPACE else ("127.0.0.1", options.port)
    address = serve(build(), host, port, allowed)
    try:
        print(f"the page is at {address} (press Ctrl-C to stop)", flush=True)
        threading.Event().wait()
    except signals.Stopped:
        os._exit(0)  # does not wait for a text that is being generated


def serve(page: gr.Blocks, host: str | None, port: int | None, allowed: Sequence[str] = ()) -> str:
    """Start the server in threads, and return its address. Raises UserError for an unusable port.

    host, port: if None, Gradio's environment variables are used. allowed: the host names, besides
    those of this machine, that the server answers to.
    """
    if port is not None:
        try:
            socket.create_server((host or "", port)).close()
        except OSError as problem:
            reason = os.strerror(problem.errno or 0)
            raise UserError(f"port {port}: {reason}; choose another with --port") from None
        except OverflowError:
            raise UserError(f"port {port}: choose one from 0 to 65535") from None
    with loopback.without_proxies():  # Gradio calls the page's own address
        _, address, _ = _launch(page, host, port, allowed)
    return address


def _launch(
    page: gr.Blocks, host: str | None, port: int | None, allowed: Sequence[str]
) -> tuple[Any, str, str | None]:
    return page.launch(
        server_name=host,
        server_port=port,
        prevent_thread_lock=True,
        quiet=True,
        share=False,
        ssr_mode=False,
        pwa=False,
        run_history=False,
        footer_links=[],
        max_threads=8,
        state_session_capacity=100,
        theme=THEME,
        css_paths=Path(__file__).with_name("app.css"),
        ssl_verify=False,  # of the page's own address, which is plain HTTP
        app_kwargs={"middleware": [Middleware(Guard, allowed=allowed)]},
    )


class Guard:
    """Middleware that only lets through small requests for the page's own paths: no files, no
    uploads, no WebSockets."""

    def __init__(self, app: ASGIApp, allowed: Sequence[str] = ()):
        self.app, self.allowed = app, allowed

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def send_with_policy(message: MutableMapping[str, Any]) -> None:
            if message["type"] == "http.response.start":
                policy = (b"content-security-policy", POLICY.encode())
                message["headers"] = [*message["headers"], policy]
            await send(message)

        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
        elif scope["type"] == "http":
            refusal = self._host_refusal(scope) or _refusal(scope)
            answer = PlainTextResponse(*refusal) if refusal else self.app
            await answer(scope, receive, send_with_policy)

    def _host_refusal(self, scope: Scope) -> tuple[str, int] | None:
        """Like _refusal, for a Host header that does not name this server."""
        headers, allowed = scope["headers"], [*self.allowed]
        if IN_SPACE:
            # Anyone may open the page there. Hugging Face's own checks use the container's address.
            allowed += [".hf.space", os.environ.get("SPACE_HOST", "").lower()]
        if loopback.is_allowed(headers, allowed, any_address=IN_SPACE):
            return None
        return f"this server does not accept that Host header: {loopback.HINT}", 403


def _refusal(scope: Scope) -> tuple[str, int] | None:
    """The body and the status code with which to reject a request; None if it is allowed."""
    path, headers = scope["path"], dict(scope["headers"])
    if path not in PATHS and not path.startswith(PREFIXES):
        return "not found", 404
    if scope["method"] == "POST":
        size = headers.get(b"content-length", b"")
        if not size.isdigit():
            return "a Content-Length header is required", 411
        if int(size) > MAX_REQUEST:
            return f"a request may have at most {MAX_REQUEST:,} bytes", 413
    return None
