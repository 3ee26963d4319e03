"""What the page shows: all that a model wrote is text, what a file holds is drawn or left out."""

import html
import re

import numpy as np
import pytest

from folio.app import html
from folio.tokens import tokenizer
from folio.inference.token_logprobs import TokenLogprobs

EVIL = "<script>alert(1)</script> ${x} {{y}} `z` \\u003c &lt; ' \" @children"


def shown(ids: list[int], prompt: int = 1) -> str:
    """The tokens' HTML, where each was as likely as not and had itself for an alternative."""
    n = len(ids) - 1
    found = TokenLogprobs(
        np.full(n, 0.5), np.array([ids[1:]]).T.reshape(n, 1), np.full((n, 1), 0.5)
    )
    return html.tokens(ids, found, prompt)


def text_of(page: str) -> str:
    return html.unescape(re.sub(r"<[^>]*>", "", page))


def test_whatever_a_model_writes_is_text():
    page = shown(tokenizer.encode(EVIL).tolist())
    assert set(re.findall(r"</?(\w+)", page)) == {"div", "span", "h2", "small", "em", "b", "p"}
    without = re.sub(r"<span class='alternatives'.*?</span></span></span>", "</span>", page)
    assert EVIL in text_of(without)
    assert not set("{}$`\\") & set(page)  # gr.HTML takes them for a template's


def test_every_token_can_be_shown_by_itself():
    page = shown([0, *range(256), 50_256, 50_300])
    assert "\\xc3" in text_of(page)  # half a character by its byte
    assert "<|endoftext|>" in text_of(page)
    assert "\ufffd" in text_of(page)


def test_a_character_of_several_tokens_is_whole_in_the_last_of_them():
    page = shown(tokenizer.encode("a\U0001d518").tolist())
    starts = re.findall(r"<span class='token[^>]*>(.*?)<span class='alternatives'", page)
    assert [html.unescape(start) for start in starts] == ["\\xf0\\x9d", "\\x94", "\U0001d518"]


def test_the_prompts_tokens_are_marked():
    assert shown([1, 2, 3, 4], prompt=3).count(" prompt'") == 2
    assert shown([1, 2, 3, 4], prompt=3).count("<span class='prompt'>") == 1


@pytest.mark.parametrize(
    "p, said",
    [(1, "100 %"), (0.314, "31 %"), (0.0314, "3.1 %"), (0.00314, "0.31 %"), (0, "&lt; 0.01 %")],
)
def test_a_probability_in_percent(p, said):
    assert html.percent(p) == said


def test_a_loss_curve_lies_within_its_picture():
    history = [{"step": step, "train_loss": 11 / step} for step in range(1, 2_000)]
    history += [{"step": 2_000, "val_loss": 4.7}]
    page = html.loss_curve(history)
    train, val = re.findall(r"points='([^']*)'", page)
    width, height = map(int, re.search(r"viewBox='0 0 (\d+) (\d+)'", page).groups())
    points = [tuple(map(float, point.split(","))) for point in f"{train} {val}".split()]
    assert 250 < len(points) <= 301
    assert all(0 <= x <= width and 0 <= y <= height for x, y in points)
    assert points[0][1] < points[-1][1]  # a higher loss is higher up


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
def test_a_history_without_a_loss_has_no_curve(history):
    page = html.loss_curve(history)
    assert "not kept" in page and "<svg" not in page and "<b>" not in page


@pytest.mark.parametrize("point", [(0, 0), (1, 5), (3_000, 1e-9), (1, 1e11)])
def test_one_point_is_a_curve_too(point):
    step, loss = point
    assert "<polyline" in html.loss_curve([{"step": step, "train_loss": loss}])
