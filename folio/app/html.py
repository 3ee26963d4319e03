"""What the page shows, as HTML.

All text goes through `escape`: a model may write anything, HTML too.
"""

import html
import math
from typing import Any

from folio.gpt.model import GPT, parameter_counts
from folio.inference.token_logprobs import TokenLogprobs
from folio.tokens import tokenizer

HEADER = "<header><h1>Folio</h1><p>Text from a trained model, and how sure it was.</p></header>"

# The least probability of each shade, and its name.
_SHADES = (
    (0.5, "\u2265 50 %"),
    (0.2, "\u2265 20 %"),
    (0.05, "\u2265 5 %"),
    (0.01, "\u2265 1 %"),
    (0.0, "< 1 %"),
)
_CURVES = {"train_loss": "training text", "val_loss": "held-out text"}
_POINTS = 300  # of a curve at most
_WIDTH, _HEIGHT, _LEFT, _ABOVE, _BELOW = 400, 210, 30, 8, 24  # of their picture, and its margins


def escape(text: str) -> str:
    """Text as HTML that shows it, in gr.HTML, too, which takes its value for a template."""
    return html.escape(text).translate({ord(c): f"&#{ord(c)};" for c in "{}$`\\"})


def line(text: str, problem: bool = False) -> str:
    return f"<p class='line{' problem' if problem else ''}' role='status'>{escape(text)}</p>"


# --- how sure


def no_tokens() -> str:
    empty = "The tokens of a text, each on a shade that says how likely the model held it."
    return f"<div class='sure'>{_legend()}<p class='empty'>{empty}</p></div>"


def tokens(ids: list[int], found: TokenLogprobs, prompt: int) -> str:
    """A text's tokens, each on a shade that says how likely it was, with its alternatives.

    prompt: how many of them the model was given.
    """
    texts = list(tokenizer.decode_stream(ids))
    spans = [f"<span class='prompt'>{_visible(texts[0])}</span>"]
    columns = zip(found.probability, found.alternatives, found.probabilities, strict=True)
    for place, (own, others, theirs) in enumerate(columns, start=1):
        token = ids[place]
        bars = "".join(_bar(int(o), p, o == token) for o, p in zip(others, theirs, strict=True))
        shade = next(i for i, (least, _) in enumerate(_SHADES) if own >= least)
        spans.append(
            f"<span class='token shade{shade}{' prompt' if place < prompt else ''}'"
            f" tabindex='{0 if place == 1 else -1}'>{_visible(texts[place]) or _alone(token)}"
            f"<span class='alternatives' role='tooltip'><span><em>{_alone(token)}</em> had"
            f" {percent(own)}. Likeliest here:</span>{bars}</span></span>"
        )
    return (
        f"<div class='sure'>{_legend()}<div class='tokens'>{''.join(spans)}</div><p class='hint'>"
        "Point at a token, or go there by Tab and the arrow keys: here is what else was likely."
        " Bold: the prompt.</p></div>"
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
    return f"<h2>How sure <small>each token's probability</small></h2><div>{shades}</div>"


def _bar(token: int, p: float, own: bool) -> str:
    return (
        f"<span class='bar{' own' if own else ''}' style='--p:{p:.1%}'>"
        f"<b>{percent(p)}</b> {_alone(token)}</span>"
    )


def _visible(text: str) -> str:
    """A token's text, with a mark before each line's end, which would not show."""
    return escape(text).replace("\n", "<i>\u21b5</i>\n")


def _alone(token: int) -> str:
    """One token by itself: marks for white space, its bytes where they are no text."""
    content = tokenizer.token_bytes(token)
    try:
        text = content.decode()
    except UnicodeDecodeError:
        text = "".join(f"\\x{byte:02x}" for byte in content)
    return escape(text.replace("\n", "\u21b5").replace(" ", "\u2423"))


# --- the model


def report(name: str, model: GPT) -> str:
    """What a model is made of."""
    p, counts = model.params, parameter_counts(model)
    rows = "".join(
        f"<tr><th scope='row'>{part}</th><td>{count:,}</td>"
        f"<td>{100 * count / counts['total']:.1f} %</td></tr>"
        for part, count in counts.items()
    )
    return (
        f"<div class='report'><h2>{escape(name)}</h2><p>{p.n_layer} layers, {p.n_head} heads,"
        f" {p.n_embd} wide, {p.block_size:,} tokens of context</p><table><thead><tr>"
        "<th scope='col'>parameters</th><td>number</td><td>share</td></tr></thead>"
        f"<tbody>{rows}</tbody></table></div>"
    )


def loss_curve(history: list[dict[str, Any]]) -> str:
    """Training and held-out loss by step, drawn in the page's own colours.

    What is no number in a row, which may be a stranger's, is passed over.
    """
    curves = [_points(history, key) for key in _CURVES]
    steps = [step for points in curves for step, _ in points]
    losses = [loss for points in curves for _, loss in points]
    if not steps:
        none = "The history of its training is not kept beside this model."
        return f"<div class='curve'><h2>Loss</h2><p>{none}</p></div>"
    grid, marks = _ticks(min(losses), max(losses)), _ticks(0, max(steps))
    across, down = _WIDTH - _LEFT - 18, _HEIGHT - _ABOVE - _BELOW

    def x(step: float) -> str:
        return f"{_LEFT + across * step / marks[-1]:.1f}"

    def y(loss: float) -> str:
        return f"{_ABOVE + down * (grid[-1] - loss) / (grid[-1] - grid[0]):.1f}"

    drawn = [
        f"<path d='M{_LEFT} {y(v)}h{across}'/>"
        f"<text x='{_LEFT - 6}' y='{y(v)}' dy='4' text-anchor='end'>{v:g}</text>"
        for v in grid
    ]
    drawn += [
        f"<text x='{x(v)}' y='{_HEIGHT - 6}' text-anchor='middle'>{v:,g}</text>" for v in marks
    ]
    for number, points in enumerate(curves):
        line = " ".join(f"{x(step)},{y(loss)}" for step, loss in points)
        drawn.append(f"<polyline class='curve{number}' points='{line}'/>")
    keys = "".join(f"<span class='key{i}'>{name}</span>" for i, name in enumerate(_CURVES.values()))
    return (
        f"<div class='curve'><h2>Loss <small>nats a token, by step</small></h2><div>{keys}</div>"
        f"<svg viewBox='0 0 {_WIDTH} {_HEIGHT}' role='img' aria-label='Loss by step'>"
        f"{''.join(drawn)}</svg></div>"
    )


def _points(history: list[dict[str, Any]], key: str) -> list[tuple[float, float]]:
    points = [(row.get("step"), row.get(key)) for row in history if isinstance(row, dict)]
    points = [point for point in points if all(map(_is_number, point))]
    return points[:: max(1, math.ceil(len(points) / _POINTS))]


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and 0 <= value < 1e12


def _ticks(least: float, most: float) -> list[float]:
    """Four to nine round numbers that hold both between them."""
    span = max(most - least, 1e-3)
    power = 10 ** math.floor(math.log10(span / 4))
    step = next(power * m for m in (1, 2, 5, 10) if span / (power * m) <= 6)
    first, last = (
        math.floor(least / step),
        max(math.ceil(most / step), math.floor(least / step) + 1),
    )
    return [round(n * step, 12) for n in range(first, last + 1)]
