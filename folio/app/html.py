"""The HTML that the page shows.

All text is escaped: a model may generate anything, HTML included.
"""

import html
import math
from typing import Any, TypeGuard

import numpy as np

from folio.gpt.model import GPT, parameter_counts
from folio.inference.token_logprobs import TokenLogprobs
from folio.tokens import tokenizer

HEADER = (
    "<header><h1>Folio</h1><p>Generate text with a trained model, and see the probability of each"
    " token.</p></header>"
)

# The lowest probability for each shade, and its label.
_SHADES = (
    (0.5, "\u2265 50 %"),
    (0.2, "\u2265 20 %"),
    (0.05, "\u2265 5 %"),
    (0.01, "\u2265 1 %"),
    (0.0, "< 1 %"),
)
_DOT = "<i>\u00b7</i>"
_CURVES = {"train_loss": "training", "val_loss": "validation"}
_MAX_POINTS = 300  # per curve
_WIDTH, _HEIGHT = 400, 210  # of the loss curve, in pixels
_LEFT, _TOP, _RIGHT, _BOTTOM = 30, 8, 18, 24  # its margins


def escape(text: str) -> str:
    """Escape text for HTML, including characters that gr.HTML would interpret as a template."""
    return html.escape(text).translate({ord(c): f"&#{ord(c)};" for c in "{}$`\\"})


def status(text: str, is_error: bool = False) -> str:
    return f"<p class='status{' error' if is_error else ''}' role='status'>{escape(text)}</p>"


# --- token probabilities


def no_tokens() -> str:
    empty = "The tokens of the text appear here, each shaded by its probability."
    return f"<div class='probabilities'>{_legend()}<p class='empty'>{empty}</p></div>"


def tokens(ids: list[int], found: TokenLogprobs, prompt: int) -> str:
    """A text's tokens, each shaded by its probability, with the most likely alternatives.

    prompt: the number of tokens at the start that are the prompt.
    """
    texts = _texts(ids)
    dots = f" {_DOT} stands for another token of the same character." if _DOT in texts else ""
    spans = [f"<span class='prompt'>{texts[0]}</span>"]
    columns = zip(np.exp(found.logprobs), found.top_ids, np.exp(found.top_logprobs), strict=True)
    for i, (p, top_ids, top_p) in enumerate(columns, start=1):
        shade = next(number for number, (bound, _) in enumerate(_SHADES) if p >= bound)
        spans.append(
            f"<span class='token shade{shade}{' prompt' if i < prompt else ''}'"
            f" tabindex='{0 if i == 1 else -1}'>{texts[i]}"
            f"{_alternatives(ids[i], p, top_ids, top_p)}</span>"
        )
    return (
        f"<div class='probabilities'>{_legend()}<div class='tokens'>{''.join(spans)}</div>"
        "<p class='hint'>Point at a token or tap it, or use Tab and the arrow keys, to see the"
        f" most likely alternatives. The prompt is bold.{dots}</p></div>"
    )


def percent(p: float) -> str:
    if p < 0.0001:
        return escape("< 0.01 %")
    return f"{100 * p:.{0 if p >= 0.1 else 1 if p >= 0.01 else 2}f} %"


def _legend() -> str:
    shades = "".join(
        f"<span class='swatch shade{i}'>{escape(name)}</span>"
        for i, (_, name) in enumerate(_SHADES)
    )
    return f"<h2>Token probabilities</h2><div>{shades}</div>"


def _alternatives(token: int, p: float, top_ids: np.ndarray, top_p: np.ndarray) -> str:
    """A token's probability, and a bar for each of the most likely tokens at that position."""
    bars = "".join(
        f"<span class='bar{' own' if other == token else ''}' style='--p:{other_p:.1%}'>"
        f"<b>{percent(other_p)}</b> {_alone(other)}</span>"
        for other, other_p in zip(top_ids.tolist(), top_p.tolist(), strict=True)
    )
    return (
        f"<span class='alternatives' role='tooltip'><span><em>{_alone(token)}</em>: {percent(p)}."
        f" Most likely:</span>{bars}</span>"
    )


def _texts(ids: list[int]) -> list[str]:
    """What is shown for each token, as HTML.

    A character of several tokens is shown with the first of them, and a dot with each other one.
    """
    shown, first = [], None
    for i, text in zip(range(len(ids)), tokenizer.decode_stream(ids), strict=False):
        if text and first is not None:
            shown[first:] = [_visible(text), *[_DOT] * (i - first)]
            first = None
        else:
            first = i if not text and first is None else first
            shown.append(_visible(text) or _alone(ids[i]))
    return shown


def _visible(text: str) -> str:
    """A token's text, with a visible mark before each line break."""
    return escape(text).replace("\n", "<i>\u21b5</i>\n")


def _alone(token: int) -> str:
    """A token on its own: white space as marks, and bytes in hex if they are not valid UTF-8."""
    content = tokenizer.token_bytes(token)
    try:
        text = content.decode()
    except UnicodeDecodeError:
        text = "".join(f"\\x{byte:02x}" for byte in content)
    return escape(text.replace("\n", "\u21b5").replace(" ", "\u2423"))


# --- the model


def parameter_table(name: str, model: GPT) -> str:
    """The model's dimensions, and the number of parameters in each part."""
    p, counts = model.params, parameter_counts(model)
    rows = "".join(
        f"<tr><th scope='row'>{part}</th><td>{count:,}</td>"
        f"<td>{100 * count / counts['total']:.1f} %</td></tr>"
        for part, count in counts.items()
    )
    return (
        f"<div class='parameters'><h2>{escape(name)}</h2><p>{p.n_layer} layers, {p.n_head} heads,"
        f" width {p.n_embd}, context {p.block_size:,}</p><table><thead><tr>"
        "<th scope='col'>parameters</th><td>number</td><td>share</td></tr></thead>"
        f"<tbody>{rows}</tbody></table></div>"
    )


def loss_curve(history: list[dict[str, Any]]) -> str:
    """Training and validation loss by step, as SVG in the page's colors.

    A history may come from an untrusted source: values that are not numbers are skipped.
    """
    curves = [_points(history, key) for key in _CURVES]
    if not any(curves):
        missing = "No training history is stored with this model."
        return f"<div class='curve'><h2>Loss</h2><p>{missing}</p></div>"
    keys = "".join(f"<span class='key{i}'>{name}</span>" for i, name in enumerate(_CURVES.values()))
    return (
        f"<div class='curve'><h2>Loss <small>nats/token, by step</small></h2><div>{keys}</div>"
        f"<svg viewBox='0 0 {_WIDTH} {_HEIGHT}' role='img' aria-label='Loss by step'>"
        f"{_drawing(curves)}</svg></div>"
    )


def _drawing(curves: list[list[tuple[float, float]]]) -> str:
    """The grid, labels and curves, and the lowest validation loss. There must be at least one
    point."""
    losses = [loss for points in curves for _, loss in points]
    grid = _ticks(min(losses), max(losses))
    marks = _ticks(0, max(step for points in curves for step, _ in points))
    width, height = _WIDTH - _LEFT - _RIGHT, _HEIGHT - _TOP - _BOTTOM

    def x(step: float) -> str:
        return f"{_LEFT + width * step / marks[-1]:.1f}"

    def y(loss: float) -> str:
        return f"{_TOP + height * (grid[-1] - loss) / (grid[-1] - grid[0]):.1f}"

    drawn = [
        f"<path d='M{_LEFT} {y(v)}h{width}'/>"
        f"<text x='{_LEFT - 6}' y='{y(v)}' dy='4' text-anchor='end'>{v:g}</text>"
        for v in grid
    ]
    drawn += [
        f"<text x='{x(v)}' y='{_HEIGHT - 6}' text-anchor='middle'>{v:,g}</text>" for v in marks
    ]
    for number, points in enumerate(curves):
        line = " ".join(f"{x(step)},{y(loss)}" for step, loss in points)
        drawn.append(f"<polyline class='curve{number}' points='{line}'/>")
    if curves[-1]:
        step, loss = min(curves[-1], key=lambda point: point[1])
        drawn.append(
            f"<circle cx='{x(step)}' cy='{y(loss)}' r='3'/><text class='best' x='{x(step)}'"
            f" y='{y(loss)}' dy='-8' text-anchor='{_anchor(step / marks[-1])}'>{loss:.3f}</text>"
        )
    return "".join(drawn)


def _anchor(place: float) -> str:
    """The side on which a label at a place of the horizontal axis, from 0 to 1, stays inside."""
    return "start" if place < 0.1 else "end" if place > 0.9 else "middle"


def _points(history: list[dict[str, Any]], key: str) -> list[tuple[float, float]]:
    found = [(row.get("step"), row.get(key)) for row in history if isinstance(row, dict)]
    points = [(step, loss) for step, loss in found if _is_number(step) and _is_number(loss)]
    return points[:: max(1, math.ceil(len(points) / _MAX_POINTS))]


def _is_number(value: Any) -> TypeGuard[float]:
    return type(value) in (int, float) and 0 <= value < 1e12


def _ticks(least: float, most: float) -> list[float]:
    """Four to nine round numbers that span the range from `least` to `most`."""
    span = max(most - least, 1e-3)
    power = 10 ** math.floor(math.log10(span / 4))
    step = next(power * m for m in (1, 2, 5, 10) if span / (power * m) <= 6)
    first, last = (
        math.floor(least / step),
        max(math.ceil(most / step), math.floor(least / step) + 1),
    )
    return [round(n * step, 12) for n in range(first, last + 1)]
