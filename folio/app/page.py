"""The layout of the page, and the handlers of its events."""

from typing import Any

import gradio as gr

from folio.app import events, html
from folio.app.models import IN_SPACE, PIPELINE
from folio.app.writing import MAX_PROMPT

EXAMPLES = ["ROMEO:\n", "First Citizen:\n", "To be, or not to be", "My lord, the king is"]
PANEL: dict[str, Any] = {"container": True, "apply_default_css": False, "min_width": 300}

# Runs in the browser.
SCRIPT = """
const $ = selector => document.querySelector(selector);

// The arrow keys move from token to token: there are too many to reach with the Tab key.
element.addEventListener('keydown', event => {
    const tokens = [...element.querySelectorAll('.token')];
    const step = {ArrowRight: 1, ArrowLeft: -1}[event.key];
    const next = step && tokens[tokens.indexOf(document.activeElement) + step];
    if (next) { next.focus(); event.preventDefault(); }
});

// Shift+Enter in the prompt clicks Generate, which does nothing while it is disabled.
document.addEventListener('keydown', event => {
    const inRequest = event.target.closest('.request textarea, .request input');
    if (event.key !== 'Enter' || !event.shiftKey || !inRequest) return;
    event.preventDefault();
    event.stopPropagation();
    $('#generate').click();
}, true);

// A button that is disabled while it has the focus passes it on to the other one.
let pressed;
document.addEventListener('focusin', event => pressed = event.target.closest('#generate, #stop'));

// The response to the last request to generate, for events.after_failure; the number of requests
// that are stopping a text, and whether another text was requested since Stop, for RESEND.
const plainFetch = window.fetch;
window.stopping = 0;
window.requested = false;
window.fetch = async (...request) => {
    const address = String(request[0].url ?? request[0]);
    const stops = address.endsWith('/cancel') || address.endsWith('/reset');
    window.stopping += stops;
    try {
        const response = await plainFetch(...request);
        if (address.includes('/queue/join')) window.joinStatus = response.status;
        return response;
    } finally {
        window.stopping -= stops;
    }
};

// Both panels follow the text, unless the visitor has scrolled up in it.
let follow = true, height = 0, tokens;
const atEnd = box => box.scrollTop + box.clientHeight > box.scrollHeight - 30;
document.addEventListener('click', event => {
    if (event.target.closest('#generate')) follow = window.requested = true;
    if (event.target.closest('#stop')) window.requested = false;
}, true);
document.addEventListener('scroll', event => {
    if (event.target.matches?.('.text textarea')) follow = atEnd(event.target);
}, true);
setInterval(() => {
    const box = $('.text textarea'), shown = $('.tokens');
    if (box && box.scrollHeight !== height) {
        height = box.scrollHeight;
        if (follow) box.scrollTop = height;
    }
    if (shown && shown !== tokens && follow) shown.scrollTop = shown.scrollHeight;
    tokens = shown;
    if (pressed?.disabled && [document.body, pressed].includes(document.activeElement))
        [$('#generate'), $('#stop')].find(button => !button.disabled)?.focus({preventScroll: true});
}, 50);
"""

# Until the server has stopped a text, it sends more of it, and Gradio would ignore the request for
# the next one. Gradio asks the server to stop a moment after it has run events.stop.
_WAIT = "do await new Promise(resolve => setTimeout(resolve, 30)); while (window.stopping);"
AFTER_STOP = f"async () => {{ {_WAIT} }}"
RESEND = f"async state => {{ {_WAIT} return [state, window.requested]; }}"

# The server rejects long requests: it gets enough of a prompt and of a seed to see that they are
# too long.
SHORTEN = f"""(name, prompt, ...rest) => {{
    rest[rest.length - 1] = rest[rest.length - 1].slice(0, 30);
    const characters = [...prompt.slice(0, {2 * MAX_PROMPT + 2})];
    return [name, characters.slice(0, {MAX_PROMPT + 1}).join(''), ...rest];
}}"""

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
                with gr.Column(elem_classes="request"):
                    model, prompt = _model_box(), _prompt_box()
                    gr.Examples([[example] for example in EXAMPLES], [prompt], label="Examples")
                    with gr.Row(elem_classes="numbers"):
                        length, seed = _length_box(), _seed_box()
                with gr.Row():
                    start = gr.Button(
                        "Generate", variant="primary", min_width=80, elem_id="generate"
                    )
                    stop = gr.Button("Stop", interactive=False, min_width=80, elem_id="stop")
                status = gr.HTML(html.status(""), apply_default_css=False)
            with gr.Column(elem_classes="settings"), gr.Group():
                settings = [*_sampling(), length, seed]
            with gr.Column(elem_classes="outputs"), gr.Row(equal_height=True, elem_classes="pair"):
                text = _text_box()
                probabilities = gr.HTML(html.no_tokens(), js_on_load=SCRIPT, **PANEL)
            with gr.Column(elem_classes="model"), gr.Row(equal_height=True, elem_classes="pair"):
                parameters, curve = (gr.HTML(visible=False, **PANEL) for _ in range(2))
        outputs = [text, probabilities, status, state]
        _on_generate([model, prompt, *settings], outputs, start, stop)
        _on_load(page, model, [parameters, curve, status])
    return page.queue(max_size=events.QUEUE_SIZE, api_open=False)


def _model_box() -> gr.Dropdown:
    return gr.Dropdown(
        [PIPELINE],
        value=PIPELINE,
        label="Model",
        info="Or type a folder, an MLflow run or models:/folio@champion.",
        allow_custom_value=not IN_SPACE,
        visible=not IN_SPACE,
    )


def _prompt_box() -> gr.Textbox:
    return gr.Textbox(
        EXAMPLES[0],
        label="Prompt",
        placeholder="The text to continue. If it is empty, the model starts on a new line.",
        lines=3,
        max_lines=8,
    )


def _length_box() -> gr.Number:
    return gr.Number(200, label="Length in tokens", min_width=100)  # validated by writing.start


def _seed_box() -> gr.Textbox:
    return gr.Textbox(label="Seed", placeholder="random", min_width=100)


def _sampling() -> list[gr.components.Component]:
    """How tokens are sampled: the inputs of events.generate between the prompt and the length."""
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
    ]  # fmt: skip


def _text_box() -> gr.Textbox:
    return gr.Textbox(
        label="Text",
        placeholder="The text will appear here as it is generated.",
        elem_classes="text",
        lines=20,
        max_lines=20,
        autoscroll=False,  # SCRIPT does it
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
    inputs: list[gr.components.Component],
    outputs: list[gr.components.Component],
    start: gr.Button,
    stop: gr.Button,
) -> None:
    """Generate text until Stop is clicked.

    inputs, outputs: those of events.generate.
    """
    text, probabilities, status, state = outputs
    requested = start.click(
        events.wait, outputs=[status, state, start, stop], js=AFTER_STOP, **_IMMEDIATE
    )
    run = requested.then(events.generate, inputs, outputs, js=SHORTEN, **_QUEUED)
    response = gr.Number(visible=False)
    run.failure(
        events.after_failure,
        [response],
        [status, start, stop],
        js="() => window.joinStatus",
        **_IMMEDIATE,
    )
    run.then(lambda: events.buttons(generating=False), outputs=[start, stop], **_IMMEDIATE)
    stopped = stop.click(
        events.stop, [state], [text, status, state, start, stop], cancels=[run], **_IMMEDIATE
    )
    stopped.then(
        events.after_stop,
        [state, gr.Checkbox(visible=False)],
        [text, probabilities, status],
        js=RESEND,
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
