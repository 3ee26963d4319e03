"""A page to try a trained model: its text as it is written, and how sure it was of each token.

python app.py --port 7860
"""

import argparse
import contextlib
import dataclasses
import functools
import os
import random
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")

import gradio as gr
import torch
from starlette.middleware import Middleware
from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Receive, Scope, Send

from folio import device, files, params, signals
from folio.app import html
from folio.cli import sample
from folio.errors import UserError, one_line_errors, say
from folio.gpt import huggingface
from folio.gpt.model import GPT
from folio.inference import generation
from folio.inference.token_logprobs import token_logprobs
from folio.run import RECORD, TRAINING, read_history, read_record
from folio.runtime import RuntimeParams
from folio.tokens import tokenizer
from folio.tracking.model_loader import load_model

PIPELINE = "models/gpt2"
SPACE = "SPACE_ID" in os.environ  # a Hugging Face Space: its visitors are strangers
PROMPT = 2_000  # characters at most
LENGTH = 1_000  # tokens at most
WAITING = 8  # texts that may wait; one is written at a time
REQUEST = 64 * 1024  # bytes at most; the longest prompt is 24 KB in JSON
EXAMPLES = ["ROMEO:\n", "First Citizen:\n", "To be, or not to be", "My lord, the king is"]
REFRESH = 0.05  # seconds between two looks at a text that is being written

# What a page may load: all of it comes from here, whatever a text on it tries.
POLICY = (
    "default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval'; object-src 'none';"
    " style-src 'self' 'unsafe-inline'; img-src 'self' data:; font-src 'self' data:"
)
# What the page asks its server for. Others serve files or take uploads.
ROUTES = ("/assets/", "/static/", "/svelte/", "/gradio_api/queue/", "/gradio_api/heartbeat/")
ROUTES_WHOLE = ("/", "/config", "/theme.css", "/favicon.ico", "/manifest.json")
ROUTES_WHOLE += tuple(
    f"/gradio_api/{name}" for name in ("startup-events", "run/predict", "cancel", "reset")
)

# The arrow keys go from token to token, which would be too many stops for the Tab key.
ARROWS = """
element.addEventListener('keydown', event => {
    const tokens = [...element.querySelectorAll('.token')];
    const step = {ArrowRight: 1, ArrowLeft: -1}[event.key];
    const next = step && tokens[tokens.indexOf(document.activeElement) + step];
    if (next) { next.focus(); event.preventDefault(); }
});
"""


@dataclasses.dataclass(frozen=True)
class Opened:
    name: str  # as it was picked
    model: GPT
    history: list[dict[str, Any]]  # of its training; empty where it is not known


@dataclasses.dataclass
class Written:
    """A text that is being written, or was."""

    opened: Opened
    ids: list[int]
    prompt: int  # tokens, at the start of ids
    wanted: int  # tokens after the prompt
    seed: int
    started: float
    seconds: float = 0.0
    stopped: bool = False


# --- models


def open_model(name: str, anew: bool = False) -> Opened:
    """The model of a folder, or of MLflow where no folder has the name. Raises UserError.

    anew: ask MLflow again, where an alias may have moved. A folder is always looked at.
    """
    name = (name or "").strip()
    if not name:
        raise UserError("no model is picked: choose one, or type a folder")
    if SPACE and name != PIPELINE:
        raise UserError(f"this page has {PIPELINE} alone")
    folder = _folder(name)
    with _opening:
        if anew and folder is None:
            _open.cache_clear()
        return _open(name, folder, _stamp(folder))


_opening = threading.Lock()  # a model is read once, whoever asks


@functools.lru_cache(maxsize=2)
def _open(name: str, folder: Path | None, stamp: tuple[int, ...]) -> Opened:
    """stamp: when the folder's files were written: a model that was trained again is read again."""
    where = device.resolve_device("auto")
    if folder is None:
        return Opened(name, *_of_mlflow(name, where))
    return Opened(name, huggingface.load(folder, where), _history(folder))


def _folder(name: str) -> Path | None:
    """The folder that a name means; None where it is for MLflow to say."""
    try:
        folder = Path(name).expanduser()
        is_path = name == PIPELINE or folder.is_dir() or os.sep in name
        return folder if is_path and not name.startswith("models:/") else None
    except (OSError, RuntimeError, ValueError):  # too long, of a user that is not there, with NUL
        raise UserError(f"{name[:100]!r} is no folder's name") from None


def _of_mlflow(name: str, where: torch.device) -> tuple[GPT, list[dict[str, Any]]]:
    """The model, and the losses of its training."""
    (runtime,) = params.load(runtime=RuntimeParams)
    from folio.tracking import queries, registry  # MLflow takes two seconds to import
    from folio.tracking.store import STORE_ERRORS, Store, first_line

    try:
        model = load_model(name, runtime.tracking_uri, where)
        store = Store.existing(runtime.tracking_uri)
        return model, queries.loss_history(store, registry.source_run_id(store, name))
    except UserError as problem:
        is_address = name.startswith("models:/")
        raise UserError(str(problem) if is_address else f"{name} is no folder; {problem}") from None
    except STORE_ERRORS as problem:
        raise UserError(f"MLflow does not give {name}: {first_line(problem)}") from None


def _stamp(folder: Path | None) -> tuple[int, ...]:
    names = ("model.safetensors", "config.json") if folder else ()
    try:
        return tuple((folder / name).stat().st_mtime_ns for name in names)
    except OSError:
        return ()  # huggingface.load names what is wrong


def _history(folder: Path) -> list[dict[str, Any]]:
    """The history of the training that made a folder's weights, from the files beside it."""
    training = folder.parent / TRAINING.name
    try:
        record = read_record(training / RECORD)
        if record.tags.get("weights_sha256") == files.sha256(folder / "model.safetensors"):
            return read_history(training / "history.jsonl")
    except UserError:
        pass
    return []


# --- the text


def write(
    name: str,
    prompt: str,
    temperature: float,
    top_k: float,
    top_p: float,
    length: float,
    seed: str,
) -> Iterator[tuple[Any, ...]]:
    """Yield the text, how sure the model was of it, a line about it, and the state, ever again."""
    try:
        opened = open_model(name)
        ids, number = read_prompt(opened.model, prompt), read_seed(seed)
    except UserError as problem:
        yield gr.skip(), gr.skip(), html.line(str(problem), problem=True), None
        return
    started = time.perf_counter()
    written = Written(opened, ids, len(ids), min(int(length), LENGTH), number, started)
    drawn = generation.generate(
        opened.model,
        list(ids),
        written.wanted,
        round(temperature, 2),
        int(top_k) or None,
        None if top_p == 1 else round(top_p, 2),
        torch.Generator().manual_seed(number),
    )
    text, shown = tokenizer.decode(ids), 0.0
    yield text, html.no_tokens(), html.line(progress(written)), written
    for piece in tokenizer.decode_stream(_kept(drawn, written)):
        text += piece
        if time.perf_counter() - shown > REFRESH:
            yield text, gr.skip(), html.line(progress(written)), gr.skip()
            shown = time.perf_counter()
    yield text, sure_html(written), html.line(progress(written)), gr.skip()


def read_prompt(model: GPT, prompt: str) -> list[int]:
    """The ids of a prompt; a line's end for an empty one. Raises UserError if it will not do."""
    if len(prompt) > PROMPT:
        raise UserError(f"the prompt has {len(prompt):,} characters: give at most {PROMPT:,}")
    return sample.encode(model, prompt or "\n")


def read_seed(seed: str) -> int:
    """Raises UserError if it is no whole number."""
    if not seed.strip():
        return random.randrange(10_000)
    try:
        return int(seed[:10]) % 2**32
    except ValueError:
        raise UserError(f"the seed is {seed[:10]!r}: give a whole number, or nothing") from None


def _kept(drawn: Iterator[int], written: Written) -> Iterator[int]:
    for token in drawn:
        written.ids.append(token)
        written.seconds = time.perf_counter() - written.started
        yield token


def progress(written: Written) -> str:
    done = len(written.ids) - written.prompt
    parts = [
        f"{done:,} tokens" if done == written.wanted else f"{done:,} of {written.wanted:,} tokens"
    ]
    if done and written.seconds:
        parts.append(f"{done / written.seconds:,.0f} tokens/s")
    parts.append(f"seed {written.seed}")
    if written.prompt > (context := written.opened.model.params.block_size):
        parts.append(
            f"of the prompt's {written.prompt:,} tokens the model sees the last {context:,}"
        )
    return ("Stopped: " if written.stopped else "") + ", ".join(parts)


def stop(written: Written | None) -> tuple[Any, ...]:
    """What the page shows after Stop; Gradio ends `write`, which may be at one more token."""
    if written is None:
        return gr.skip(), html.line("Stopped before it began."), None, *buttons(writing=False)
    written = dataclasses.replace(written, ids=list(written.ids), stopped=True)
    line = html.line(progress(written))
    return tokenizer.decode(written.ids), line, written, *buttons(writing=False)


def stopped(written: Written | None) -> tuple[Any, ...]:
    """The same, and how sure the model was, behind what `write` had sent when it was stopped: that
    may reach the page later than what `stop` says."""
    if written is None or not written.stopped:  # there is another text by now
        return gr.skip(), gr.skip(), gr.skip()
    return tokenizer.decode(written.ids), sure_html(written), html.line(progress(written))


def busy(written: Written | None) -> tuple[Any, ...]:
    """After `write` failed: the queue is full, or a program asks for what the page does not. What
    Stop ends in the middle of a token counts as failed, too, and has its own line."""
    if written is not None:
        return gr.skip(), *buttons(writing=False)
    said = f"Not written: {WAITING} requests may wait, and so many do. Try again in a minute."
    return html.line(said, problem=True), *buttons(writing=False)


# --- what is shown


def sure_html(written: Written | None) -> str:
    if written is None or len(written.ids) < 2:
        return html.no_tokens()
    ids = list(written.ids)
    return html.tokens(ids, token_logprobs(written.opened.model, ids), written.prompt)


def show_model(name: str) -> tuple[Any, ...]:
    """The picked model's report and loss curve, or a line that says why there is no model."""
    try:
        opened = open_model(name, anew=True)
    except UserError as problem:
        hidden = gr.update(value="", visible=False)
        return hidden, hidden, html.line(str(problem), problem=True)
    shown = html.report(opened.name, opened.model), html.loss_curve(opened.history)
    return *(gr.update(value=value, visible=True) for value in shown), html.line("")


def choices() -> Any:
    """The models to pick from: the pipeline's, and MLflow's where there is a store."""
    with contextlib.suppress(UserError):  # no store, or one that was moved: the folder is there
        (runtime,) = params.load(runtime=RuntimeParams)
        from folio.tracking import registry  # MLflow takes two seconds to import
        from folio.tracking.store import STORE_ERRORS, Store

        with contextlib.suppress(*STORE_ERRORS):
            found = registry.available_models(Store.existing(runtime.tracking_uri))
            return gr.update(choices=[(PIPELINE, PIPELINE), *found])
    return gr.skip()


def buttons(writing: bool) -> tuple[Any, Any]:
    return gr.update(interactive=not writing), gr.update(interactive=writing)


# --- the page


def build() -> gr.Blocks:
    with gr.Blocks(title="Folio", analytics_enabled=False) as page:
        gr.HTML(html.HEADER, apply_default_css=False)
        written = gr.State()
        bare = {"container": True, "apply_default_css": False, "min_width": 300}
        with gr.Row(elem_classes="page"):
            with gr.Column(elem_classes="ask"):
                model = gr.Dropdown(
                    [PIPELINE],
                    value=PIPELINE,
                    label="Model",
                    info="Choose one, or type a folder, an MLflow run or models:/folio@champion.",
                    allow_custom_value=not SPACE,
                    visible=not SPACE,
                )
                prompt = gr.Textbox(
                    EXAMPLES[0],
                    label="Prompt",
                    info="The text goes on from here; empty: it begins on a new line.",
                    lines=3,
                    max_lines=8,
                    max_length=PROMPT,
                )
                gr.Examples([[example] for example in EXAMPLES], [prompt], label="Examples")
                with gr.Row():
                    go = gr.Button("Write", variant="primary", min_width=80)
                    halt = gr.Button("Stop", interactive=False, min_width=80)
                status = gr.HTML(html.line(""), apply_default_css=False)
            with gr.Column(elem_classes="settings"), gr.Group():
                settings = controls()
            with gr.Column(elem_classes="out"), gr.Row(equal_height=True, elem_classes="pair"):
                text = gr.Textbox(
                    label="Text",
                    placeholder="It appears here while it is written.",
                    elem_classes="text",
                    lines=20,
                    max_lines=20,
                    interactive=False,
                    buttons=["copy"],
                    min_width=300,
                )
                sure = gr.HTML(sure_html(None), js_on_load=ARROWS, **bare)
            with gr.Column(elem_classes="shown"), gr.Row(equal_height=True, elem_classes="pair"):
                report, curve = (gr.HTML(visible=False, **bare) for _ in range(2))
        quick = {"queue": False, "show_progress": "hidden", "api_visibility": "private"}
        lane = {"show_progress": "hidden", "api_visibility": "private", "concurrency_limit": 1}
        wait = "Waiting for its turn: one text is written at a time."
        begin = gr.on(
            [go.click, prompt.submit],
            lambda: (html.line(wait), None, *buttons(writing=True)),
            outputs=[status, written, go, halt],
            **quick,
        )
        run = begin.then(write, [model, prompt, *settings], [text, sure, status, written], **lane)
        run.failure(busy, [written], [status, go, halt], **quick)
        run.then(lambda: buttons(writing=False), outputs=[go, halt], **quick)
        halt.click(stop, [written], [text, status, written, go, halt], cancels=[run], **quick).then(
            stopped, [written], [text, sure, status], concurrency_id="sure", **lane
        )
        gr.on(
            [page.load, model.change],
            show_model,
            [model],
            [report, curve, status],
            concurrency_id="show",
            **lane,
        )
        if not SPACE:
            page.load(choices, outputs=[model], concurrency_id="choices", **lane)
    return page.queue(max_size=WAITING, api_open=False)


def controls() -> list[gr.components.Component]:
    """What `write` takes after the prompt."""
    return [
        gr.Slider(
            0, 2, 0.8, step=0.05, label="Temperature",
            info="0 takes the likeliest token each time; higher is bolder.",
        ),
        gr.Slider(
            0, 200, 0, step=1, label="Top-k",
            info="Draw among the k likeliest tokens; 0: among all.",
        ),
        gr.Slider(
            0.05, 1, 0.95, step=0.05, label="Top-p",
            info="Draw among the likeliest that together have this probability.",
        ),
        gr.Slider(
            1, LENGTH, 200, step=1, label="Length", info="Tokens to write; one is about 3 letters."
        ),
        gr.Textbox(
            label="Seed", placeholder="another each time", max_length=10,
            info="A whole number: the same one writes the same text again.",
        ),
    ]  # fmt: skip


THEME = gr.themes.Base(
    primary_hue="blue",
    neutral_hue="slate",
    radius_size="sm",
    font=["ui-sans-serif", "system-ui", "sans-serif"],
    font_mono=["ui-monospace", "monospace"],
).set(
    block_info_text_color="*neutral_600",
    block_info_text_color_dark="*neutral_300",
    block_title_text_color="*neutral_800",
    block_title_text_color_dark="*neutral_100",
    input_placeholder_color="*neutral_500",
    input_placeholder_color_dark="*neutral_300",
    body_text_color_subdued="*neutral_600",
    body_text_color_subdued_dark="*neutral_300",
)


# --- the server


class Guard:
    """Answers what the page asks for, in small requests, and nothing else: no file, no upload."""

    def __init__(self, app: ASGIApp):
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def send_with_policy(message: dict[str, Any]) -> None:
            if message["type"] == "http.response.start":
                policy = (b"content-security-policy", POLICY.encode())
                message["headers"] = [*message["headers"], policy]
            await send(message)

        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
        elif scope["type"] == "http":  # a WebSocket the page has none of
            refusal = _refusal(scope)
            answer = PlainTextResponse(*refusal) if refusal else self.app
            await answer(scope, receive, send_with_policy)


def _refusal(scope: Scope) -> tuple[str, int] | None:
    path, headers = scope["path"], dict(scope["headers"])
    if path not in ROUTES_WHOLE and not path.startswith(ROUTES):
        return "not here", 404
    if scope["method"] == "POST":
        size = headers.get(b"content-length", b"")
        if not size.isdigit():
            return "its length is not said", 411
        if int(size) > REQUEST:
            return "too long", 413
    return None


def serve(page: gr.Blocks, host: str | None, port: int | None) -> str:
    """Start the server, in threads of its own. Returns its address; raises UserError."""
    if port is not None:
        try:
            socket.create_server((host, port)).close()
        except (OSError, OverflowError) as problem:
            reason = os.strerror(problem.errno) if isinstance(problem, OSError) else "no such port"
            raise UserError(f"port {port}: {reason}; take another with --port") from None
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--port", type=int, default=7860, help="on 127.0.0.1 (7860)")
    port = parser.parse_args().port
    try:
        open_model(PIPELINE)
    except UserError as problem:
        say(str(problem))
    # A Space says by GRADIO_SERVER_NAME and GRADIO_SERVER_PORT where to listen.
    address = serve(build(), *((None, None) if SPACE else ("127.0.0.1", port)))
    try:
        print(f"Folio's page is at {address} (Ctrl-C ends it)", flush=True)
        threading.Event().wait()
    except signals.Stopped:
        os._exit(0)  # a text may be being written


if __name__ == "__main__":
    with one_line_errors():
        main()
