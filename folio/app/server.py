"""The page's server: how it is started, and which requests it refuses."""

import argparse
import os
import socket
import threading
from collections.abc import MutableMapping
from pathlib import Path
from typing import Any

import gradio as gr
from starlette.middleware import Middleware
from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Receive, Scope, Send

from folio import signals
from folio.app.models import IN_SPACE, PIPELINE, open_model
from folio.app.page import THEME, build
from folio.errors import UserError, report

MAX_REQUEST = 64 * 1024  # bytes; the longest prompt is 24 KB in JSON

# What the browser may load: everything comes from this server, whatever a text on the page tries.
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
    parser = argparse.ArgumentParser(description="Serve the page for trying a trained model.")
    parser.add_argument("--port", type=int, default=7860, help="port on 127.0.0.1 (7860)")
    port = parser.parse_args().port
    try:
        open_model(PIPELINE)
    except UserError as problem:
        report(str(problem))
    # A Space sets GRADIO_SERVER_NAME and GRADIO_SERVER_PORT.
    host, port = (None, None) if IN_SPACE else ("127.0.0.1", port)
    address = serve(build(), host, port)
    try:
        print(f"the page is at {address} (Ctrl-C stops it)", flush=True)
        threading.Event().wait()
    except signals.Stopped:
        os._exit(0)  # does not wait for a text that is being generated


def serve(page: gr.Blocks, host: str | None, port: int | None) -> str:
    """Start the server in threads, and return its address. Raises UserError for an unusable port.

    host, port: None leaves them to Gradio's environment variables.
    """
    if port is not None:
        try:
            socket.create_server((host or "", port)).close()
        except OSError as problem:
            reason = os.strerror(problem.errno or 0)
            raise UserError(f"port {port}: {reason}; choose another with --port") from None
        except OverflowError:
            raise UserError(f"port {port}: choose one from 0 to 65535") from None
    _, address, _ = page.launch(
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
        app_kwargs={"middleware": [Middleware(Guard)]},
    )
    return address


class Guard:
    """Middleware that lets only small requests for the page's own paths through: no files, no
    uploads, no WebSockets."""

    def __init__(self, app: ASGIApp):
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def send_with_policy(message: MutableMapping[str, Any]) -> None:
            if message["type"] == "http.response.start":
                policy = (b"content-security-policy", POLICY.encode())
                message["headers"] = [*message["headers"], policy]
            await send(message)

        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
        elif scope["type"] == "http":
            refusal = _refusal(scope)
            answer = PlainTextResponse(*refusal) if refusal else self.app
            await answer(scope, receive, send_with_policy)


def _refusal(scope: Scope) -> tuple[str, int] | None:
    """The body and the status code that refuse a request; None if it may pass."""
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
