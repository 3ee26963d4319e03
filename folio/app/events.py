"""The page's event handlers: each function returns or yields new values for the page's components.

gr.skip() leaves a component unchanged.
"""

import dataclasses
import time
from collections.abc import Iterator
from typing import Any

import gradio as gr

from folio.app import html, models, writing
from folio.app.writing import Text, progress
from folio.errors import UserError
from folio.inference.token_logprobs import token_logprobs

QUEUE_SIZE = 8  # requests that may wait; the server generates one text at a time
REFRESH = 0.05  # minimum seconds between updates of the page

Values = tuple[Any, ...]  # one for each output of an event


def wait() -> Values:
    """The status, the state and the buttons after Generate."""
    line = html.status("Waiting: the server generates one text at a time.")
    return line, None, *buttons(generating=True)


def generate(
    name: str,
    prompt: str,
    temperature: float,
    top_k: float,
    top_p: float,
    length: float | None,
    seed: str,
) -> Iterator[Values]:
    """Yield the text, its token probabilities, the status and the state during generation."""
    try:
        text = writing.start(models.open_model(name), prompt, length, seed)
    except UserError as problem:
        yield gr.skip(), gr.skip(), html.status(str(problem), is_error=True), None
        return
    content, shown = text.content, 0.0
    yield content, html.no_tokens(), html.status(progress(text)), text
    try:
        for content in writing.generate(text, temperature, top_k, top_p):
            if time.perf_counter() - shown > REFRESH:
                yield content, gr.skip(), html.status(progress(text)), gr.skip()
                shown = time.perf_counter()
    except UserError as problem:
        yield content, gr.skip(), html.status(str(problem), is_error=True), gr.skip()
        return
    yield content, probabilities(text), html.status(progress(text)), gr.skip()


def stop(text: Text | None) -> Values:
    """The text, the status, the state and the buttons after Stop.

    Gradio cancels `generate`, which may still add one more token to its own copy of the text.
    """
    if text is None:
        line = html.status("Stopped before the first token.")
        return gr.skip(), line, None, *buttons(generating=False)
    text = dataclasses.replace(text, ids=list(text.ids), stopped=True)
    return text.content, html.status(progress(text)), text, *buttons(generating=False)


def after_stop(text: Text | None, requested: bool) -> Values:
    """The text, its token probabilities and the status, once `generate` has been cancelled.

    Sent again because updates from `generate` may reach the page after the one from `stop`.
    requested: whether the visitor has already requested another text, which may be ready before
    these probabilities are.
    """
    if requested or text is None or not text.stopped:
        return gr.skip(), gr.skip(), gr.skip()
    return text.content, probabilities(text), html.status(progress(text))


def after_failure(status: float | None) -> Values:
    """The status and the buttons after `generate` failed.

    status: the HTTP status with which the server responded to the request. Gradio also reports a
    failure if a text is stopped, before its turn or in the middle of a token: then the server had
    accepted the request, and nothing changes.
    """
    if status is None or status < 400:
        return gr.skip(), gr.skip(), gr.skip()
    line = f"The server has rejected the request (HTTP status {status:g})."
    if status == 503:
        line = f"The queue is full: {QUEUE_SIZE} requests are waiting. Try again in a minute."
    return html.status(line, is_error=True), *buttons(generating=False)


def probabilities(text: Text | None) -> str:
    if text is None or len(text.ids) < 2:
        return html.no_tokens()
    ids = list(text.ids)
    return html.tokens(ids, token_logprobs(text.source.model, ids), text.prompt_tokens)


def show_model(name: str) -> Values:
    """The model's parameter counts, its loss curve, and the status, which is empty or an error."""
    try:
        source = models.open_model(name, refresh=True)
    except UserError as problem:
        hidden = gr.update(value="", visible=False)
        return hidden, hidden, html.status(str(problem), is_error=True)
    shown = html.parameter_table(source.name, source.model), html.loss_curve(source.history)
    return *(gr.update(value=value, visible=True) for value in shown), html.status("")


def list_models() -> dict[str, Any]:
    return gr.update(choices=models.available())


def buttons(generating: bool) -> Values:
    """The states of Generate and Stop."""
    return gr.update(interactive=not generating), gr.update(interactive=generating)
