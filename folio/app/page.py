"""The layout of the page, and the handlers of its events."""

from typing import Any

import gradio as gr

from folio.app import events, html
from folio.app.models import IN_SPACE, PIPELINE
from folio.app.writing import MAX_PROMPT, MAX_TOKENS

EXAMPLES = ["ROMEO:\n", "First Citizen:\n", "To be, or not to be", "My lord, the king is"]
PANEL: dict[str, Any] = {"container": True, "apply_default_css": False, "min_width": 300}

# The arrow keys move from token to token: there are too many to reach with the Tab key.
ARROW_KEYS = """
element.addEventListener('keydown', event => {
    const tokens = [...element.querySelectorAll('.token')];
    const step = {ArrowRight: 1, ArrowLeft: -1}[event.key];
    const next = step && tokens[tokens.indexOf(document.activeElement) + step];
    if (next) { next.focus(); event.preventDefault(); }
});
"""

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


def build() -> gr.Blocks:
    with gr.Blocks(title="Folio", analytics_enabled=False) as page:
        gr.HTML(html.HEADER, apply_default_css=False)
        state = gr.State()  # a writing.Text, or None
        with gr.Row(elem_classes="page"):
            with gr.Column(elem_classes="inputs"):
                model, prompt = _model_box(), _prompt_box()
                gr.Examples([[example] for example in EXAMPLES], [prompt], label="Examples")
                with gr.Row():
                    start = gr.Button("Generate", variant="primary", min_width=80)
                    stop = gr.Button("Stop", interactive=False, min_width=80)
                status = gr.HTML(html.status(""), apply_default_css=False)
            with gr.Column(elem_classes="settings"), gr.Group():
                settings = _settings()
            with gr.Column(elem_classes="outputs"), gr.Row(equal_height=True, elem_classes="pair"):
                text = _text_box()
                probabilities = gr.HTML(html.no_tokens(), js_on_load=ARROW_KEYS, **PANEL)
            with gr.Column(elem_classes="model"), gr.Row(equal_height=True, elem_classes="pair"):
                parameters, curve = (gr.HTML(visible=False, **PANEL) for _ in range(2))
        outputs = [text, probabilities, status, state]
        _on_generate([start.click, prompt.submit], [model, prompt, *settings], outputs, start, stop)
        _on_load(page, model, [parameters, curve, status])
    return page.queue(max_size=events.QUEUE_SIZE, api_open=False)


def _model_box() -> gr.Dropdown:
    return gr.Dropdown(
        [PIPELINE],
        value=PIPELINE,
        label="Model",
        info="Choose one, or type a folder, an MLflow run or models:/folio@champion.",
        allow_custom_value=not IN_SPACE,
        visible=not IN_SPACE,
    )


def _prompt_box() -> gr.Textbox:
    return gr.Textbox(
        EXAMPLES[0],
        label="Prompt",
        info="The model continues this text. If it is empty, the model starts on a new line.",
        lines=3,
        max_lines=8,
        max_length=MAX_PROMPT,
    )


def _settings() -> list[gr.components.Component]:
    """The inputs of events.generate that follow the prompt."""
    return [
        gr.Slider(
            0, 2, 0.8, step=0.05, label="Temperature",
            info="0 always picks the most likely token; higher values give more varied text.",
        ),
        gr.Slider(
            0, 200, 0, step=1, label="Top-k",
            info="Sample from the k most likely tokens; 0 means all.",
        ),
        gr.Slider(
            0.05, 1, 0.95, step=0.05, label="Top-p",
            info="Sample from the most likely tokens whose probabilities add up to this value.",
        ),
        gr.Slider(
            1, MAX_TOKENS, 200, step=1, label="Length",
            info="Tokens to generate; a token is about 3 letters.",
        ),
        gr.Textbox(
            label="Seed", placeholder="random", max_length=10,
            info="A whole number. The same seed gives the same text.",
        ),
    ]  # fmt: skip


def _text_box() -> gr.Textbox:
    return gr.Textbox(
        label="Text",
        placeholder="The text will appear here as it is generated.",
        elem_classes="text",
        lines=20,
        max_lines=20,
        interactive=False,
        buttons=["copy"],
        min_width=300,
    )


_IMMEDIATE: dict[str, Any] = {
    "queue": False,
    "show_progress": "hidden",
    "api_visibility": "private",
}
_QUEUED: dict[str, Any] = {
    "concurrency_limit": 1,
    "show_progress": "hidden",
    "api_visibility": "private",
}


def _on_generate(
    triggers: list[Any],
    inputs: list[gr.components.Component],
    outputs: list[gr.components.Component],
    start: gr.Button,
    stop: gr.Button,
) -> None:
    """Generate text on any of the triggers, until Stop is clicked.

    inputs, outputs: those of events.generate.
    """
    text, probabilities, status, state = outputs
    requested = gr.on(triggers, events.wait, outputs=[status, state, start, stop], **_IMMEDIATE)
    run = requested.then(events.generate, inputs, outputs, **_QUEUED)
    run.failure(events.after_failure, [state], [status, start, stop], **_IMMEDIATE)
    run.then(lambda: events.buttons(generating=False), outputs=[start, stop], **_IMMEDIATE)
    stopped = stop.click(
        events.stop, [state], [text, status, state, start, stop], cancels=[run], **_IMMEDIATE
    )
    stopped.then(
        events.after_stop,
        [state],
        [text, probabilities, status],
        concurrency_id="after stop",
        **_QUEUED,
    )


def _on_load(page: gr.Blocks, model: gr.Dropdown, outputs: list[gr.components.Component]) -> None:
    """Show the selected model when the page is opened and when another one is selected."""
    gr.on(
        [page.load, model.change],
        events.show_model,
        [model],
        outputs,
        concurrency_id="model",
        **_QUEUED,
    )
    if not IN_SPACE:
        page.load(events.list_models, outputs=[model], concurrency_id="models", **_QUEUED)
