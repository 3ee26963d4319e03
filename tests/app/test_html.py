"""The page's HTML: whatever a model generates is escaped, and a damaged history does no harm."""

import re
from html import unescape

import numpy as np
import pytest

from folio.app import html
from folio.inference.token_logprobs import TokenLogprobs
from folio.tokens import tokenizer

EVIL = "<script>alert(1)</script> ${x} {{y}} `z` \\u003c &lt; ' \" @children"


def shown(ids: list[int], prompt: int = 1) -> str:
    """The tokens' HTML; each has a probability of 50 % and is its only alternative."""
    n = len(ids) - 1
    half = np.full((n, 1), np.log(0.5))
    found = TokenLogprobs(half[:, 0], np.array([ids[1:]]).T.reshape(n, 1), half)
    return html.tokens(ids, found, prompt)


def text_of(page: str) -> str:
    return unescape(re.sub(r"<[^>]*>", "", page))


def test_generated_html_is_escaped():
    page = shown(tokenizer.encode(EVIL).tolist())
    assert set(re.findall(r"</?(\w+)", page)) == {"div", "span", "h2", "em", "b", "p"}
    without = re.sub(r"<span class='alternatives'.*?</span></span></span>", "</span>", page)
    assert EVIL in text_of(without)
    assert not set("{}$`\\") & set(page)  # gr.HTML would interpret them as a template


def test_every_token_can_be_shown_on_its_own():
    page = shown([0, *range(256), 50_256, 50_300])
    assert "\\xc3" in text_of(page)  # the byte of half a character
    assert "<|endoftext|>" in text_of(page)
    assert "\ufffd" in text_of(page)


@pytest.mark.parametrize(
    "text", ["\U0001d518", "\u65e5\u672c\u8a9e", "\u041f\u0440\u0438", "\U0001f600b"]
)
def test_a_character_of_several_tokens_is_shown_with_the_first_one(text):
    ids = tokenizer.encode(f"a{text}").tolist()
    starts = re.findall(r"<span class='token[^>]*>(.*?)<span class='alternatives'", shown(ids))
    assert len(starts) == len(ids) - 1
    assert "".join(map(text_of, starts)).replace("\u00b7", "") == text
    assert text_of(starts[0]) == text[0]
    assert "another token of the same character" in shown(ids)
    assert "another token" not in shown(tokenizer.encode("abc").tolist())


def test_an_incomplete_character_at_the_end_is_shown_as_bytes():
    ids = tokenizer.encode("a\U0001d518").tolist()[:-1]
    starts = re.findall(r"<span class='token[^>]*>(.*?)<span class='alternatives'", shown(ids))
    assert text_of(" ".join(starts)) == "\\xf0\\x9d \\x94"


def test_the_tokens_of_the_prompt_are_marked():
    assert shown([1, 2, 3, 4], prompt=3).count(" prompt'") == 2
    assert shown([1, 2, 3, 4], prompt=3).count("<span class='prompt'>") == 1


@pytest.mark.parametrize(
    ("p", "text"),
    [(1, "100 %"), (0.314, "31 %"), (0.0314, "3.1 %"), (0.00314, "0.31 %"), (0, "&lt; 0.01 %")],
)
def test_percent_keeps_two_significant_digits(p, text):
    assert html.percent(p) == text


def test_loss_curve_stays_within_its_view_box():
    history = [{"step": step, "train_loss": 11 / step} for step in range(1, 2_000)]
    history += [{"step": 2_000, "val_loss": 4.7}]
    page = html.loss_curve(history)
    train, val = re.findall(r"points='([^']*)'", page)
    width, height = map(int, re.search(r"viewBox='0 0 (\d+) (\d+)'", page).groups())
    points = [tuple(map(float, point.split(","))) for point in f"{train} {val}".split()]
    assert 250 < len(points) <= 301
    assert all(0 <= x <= width and 0 <= y <= height for x, y in points)
    assert points[0][1] < points[-1][1]  # a higher loss is higher up


@pytest.mark.parametrize(("best", "anchor"), [(0, "start"), (500, "middle"), (1_000, "end")])
def test_loss_curve_names_the_lowest_validation_loss(best, anchor):
    rows = [{"step": s, "val_loss": 4.7081 if s == best else 5.0} for s in range(0, 1_001, 100)]
    page = html.loss_curve(rows)
    [(x, found)] = re.findall(r"class='best' x='([\d.]+)'.*?text-anchor='(\w+)'>4\.708<", page)
    assert found == anchor and 0 < float(x) < 400
    assert "class='best'" not in html.loss_curve([{"step": 1, "train_loss": 5.0}])


@pytest.mark.parametrize(
    "history",
    [
        [],
        [{}, 1, None, {"step": 1}, {"train_loss": 2}],
        [{"step": "<b>", "train_loss": "<b>"}, {"step": 1, "train_loss": float("nan")}],
        [{"step": 1, "train_loss": float("inf")}, {"step": -1, "train_loss": [1]}],
        [{"step": True, "train_loss": 1}, {"step": 1, "train_loss": 10**400}],
    ],
)
def test_loss_curve_is_left_out_if_the_history_has_no_losses(history):
    page = html.loss_curve(history)
    assert "No training history" in page and "<svg" not in page and "<b>" not in page


@pytest.mark.parametrize("point", [(0, 0), (1, 5), (3_000, 1e-9), (1, 1e11)])
def test_loss_curve_accepts_a_single_point(point):
    step, loss = point
    assert "<polyline" in html.loss_curve([{"step": step, "train_loss": loss}])
