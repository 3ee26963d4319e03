"""The metrics of an evaluation and their report; the page of samples."""

import math
import tempfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROWS
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.configuration import set_hypothesis_home_dir
from markdown_it import MarkdownIt

from folio.gpt.model import GPT, ModelParams
from folio.gpt.validation import token_losses
from folio.inference import evaluation
from folio.inference.evaluation import (
    EvaluateParams,
    compute_metrics,
    format_report,
    samples_page,
)
from folio.tokens import tokenizer
from folio.tokens.token_files import TokenData

set_hypothesis_home_dir(Path(tempfile.gettempdir()) / "hypothesis")  # for its caches

PARAMS = EvaluateParams(
    stride=4,
    whole_training_text=False,
    prompts=["The sea", "\n"],
    temperatures=[0.0, 0.7],
    sample_tokens=5,
    top_k=None,
    top_p=0.95,
    seed=1,
)


def data(train_tokens=200, val_tokens=50):
    ids = np.random.default_rng(1).integers(ROWS, size=train_tokens + val_tokens).astype(np.uint16)
    meta = {"val_characters": 170, "val_bytes": 180}
    train, val = ids[:train_tokens], ids[train_tokens:]
    return TokenData(train, val, meta, digest="", train_counts=np.bincount(train, minlength=ROWS))


@pytest.fixture(scope="module")
def writer():
    """A model with GPT-2's vocabulary and random weights."""
    torch.manual_seed(1)
    params = ModelParams(n_layer=1, n_head=1, n_embd=4, block_size=16, dropout=0.0)
    return GPT(params, tokenizer.VOCAB_SIZE).eval()


def test_metrics_are_derived_from_the_losses(model):
    tokens = data()
    losses = token_losses(model, tokens.val)
    metrics = compute_metrics(model, tokens, losses, PARAMS)
    assert metrics["val_loss"] == pytest.approx(losses.mean())
    assert metrics["val_loss_per_character"] == pytest.approx(losses.sum() / 170)
    assert metrics["val_bits_per_byte"] == pytest.approx(losses.sum() / math.log(2) / 180)
    assert metrics["val_perplexity"] == pytest.approx(math.exp(losses.mean()))
    sliding = token_losses(model, tokens.val, 4).mean()
    assert metrics["val_loss_sliding"] == pytest.approx(sliding)
    assert metrics["val_loss_sliding"] != pytest.approx(metrics["val_loss"])
    end_of_train = token_losses(model, tokens.train[-50:]).mean()
    assert metrics["train_loss"] == pytest.approx(end_of_train)
    assert metrics["train_tokens"] == 50


def test_training_loss_can_cover_the_whole_training_text(model):
    tokens = data()
    whole = replace(PARAMS, whole_training_text=True)
    metrics = compute_metrics(model, tokens, token_losses(model, tokens.val), whole)
    assert metrics["train_loss"] == pytest.approx(token_losses(model, tokens.train).mean())
    assert metrics["train_tokens"] == 200
    assert " on 200 tokens of the training text" in format_report(metrics)


def test_perplexity_of_a_huge_loss_is_finite(model):
    metrics = compute_metrics(model, data(), np.full(49, 1e6), PARAMS)
    assert math.isfinite(metrics["val_perplexity"])


def test_report_shows_every_metric(model):
    tokens = data()
    metrics = compute_metrics(model, tokens, token_losses(model, tokens.val), PARAMS)
    report = format_report(metrics)
    for name, value in metrics.items():
        digits = {"val_perplexity": 1, "train_tokens": 0}.get(name, 4)
        assert f" {value:.{digits}f}" in report.replace("(", " "), name


def test_samples_page_has_a_sample_per_prompt_and_temperature(writer):
    page = samples_page(writer, PARAMS)
    titles = [line for line in page.splitlines() if line.startswith("#")]
    assert titles == [
        "# Samples",
        "## The sea, temperature 0",
        "## The sea, temperature 0.7",
        "## No prompt, temperature 0",
        "## No prompt, temperature 0.7",
    ]
    assert page.count("\n    The sea") == 2


def test_samples_page_seeds_each_sample_separately(writer):
    page = samples_page(writer, PARAMS)
    assert samples_page(writer, PARAMS) == page
    last = page[page.index("## No prompt, temperature 0.7") :]
    other = samples_page(writer, replace(PARAMS, prompts=["A star", "\n"]))
    assert other.endswith(last) and other != page
    assert not samples_page(writer, replace(PARAMS, seed=2)).endswith(last)


def test_params_reject_an_empty_prompt():
    with pytest.raises(ValueError, match="prompts: a prompt is empty"):
        replace(PARAMS, prompts=["The sea", ""])


# --- samples.md shows text as text

# Each could end a block, start another, or be rendered, if it were not part of a code block.
HOSTILE = [
    "\r", "\r\r", "\r\n", "\n\r", "\v", "\f", "\x1c", "\x1d", "\x1e", "\x85", "\u2028", "\u2029",
    "\0", "\x1b[31m", "\x7f", "\t", "    ", "\ud800", "\ufeff", "\n\n", "\n \n", "\n\n\n",
    "<script>alert(1)</script>", "<img src=x onerror=alert(1)>", "<!--", "-->", "</pre></code>",
    "```", "````\n", "~~~", "\n```\n<b>\n```\n", "# heading", "\n# heading\n", "\n---\n", "***",
    "\n===\n", "> quote", "\n> quote", "- item", "1. item", "[a](javascript:x)", "![a](http://x/y)",
    "[a]: http://x", "| a | b |\n|---|---|", "$x$", "$$\nx\n$$", "&lt;b&gt;", "<http://x>", "\\",
    "`", "{{ x }}", "{% x %}", "x" * 100_000, "@all", "#1", "::: note\n",
]  # fmt: skip


def blocks(page: str) -> list[tuple[str, str]]:
    """The leaf blocks of a Markdown page: their kind and content."""
    tokens = MarkdownIt("commonmark").enable("table").parse(page)
    return [(each.type, each.content) for each in tokens if not each.nesting]


def page_of(prompt: str, text: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """The page of samples on which a model continues a prompt with a text."""
    monkeypatch.setattr(evaluation.generation, "generate", lambda *_: iter(()))
    monkeypatch.setattr(evaluation.tokenizer, "decode", lambda _: text)
    params = replace(PARAMS, prompts=[prompt, "the end"], temperatures=[0.5])
    return samples_page(None, params)


@pytest.mark.parametrize("hostile", HOSTILE, ids=lambda text: repr(text)[:20])
def test_whatever_a_model_writes_stays_in_its_code_block(hostile, monkeypatch):
    for before in ("", "a ", "a\n", "a\r", "a\n\n", "    "):
        page = page_of("The sea", f"{before}{hostile}<b>x</b>", monkeypatch)
        kinds = ["inline", "inline", "code_block", "inline", "code_block"]
        assert [kind for kind, _ in blocks(page)] == kinds, repr(before)
        code = blocks(page)[2][1]
        assert code.startswith("The sea") and code.endswith("<b>x</b>\n"), repr(before)
        assert page.encode().decode() == page
        assert set(page) & set("\r\v\f\x1c\x85\u2028\u2029\0\x1b\x7f") == set()
        plain = all(line.isprintable() for line in hostile.split("\n"))
        assert (hostile in page or "\n" in hostile) or not plain


@pytest.mark.parametrize("hostile", HOSTILE, ids=lambda text: repr(text)[:20])
def test_whatever_a_prompt_contains_is_the_text_of_one_heading(hostile, monkeypatch):
    page = page_of(f"A star {hostile} at sea", "", monkeypatch)
    kinds = ["inline", "inline", "code_block", "inline", "code_block"]
    assert [kind for kind, _ in blocks(page)] == kinds
    [inline] = [token for token in MarkdownIt("commonmark").parse(page) if token.content][1:2]
    assert {child.type for child in inline.children} <= {"text", "text_special"}
    assert max(map(len, page.splitlines()[:3])) < 250


@settings(deadline=None, database=None, derandomize=True)
@given(text=st.text(st.characters() | st.sampled_from("\r\n\x85\u2028 `<>#-*\t\f\v")))
def test_any_text_stays_in_its_code_block(text):
    with pytest.MonkeyPatch.context() as patch:
        page = page_of("The sea", f"{text}<b>x</b>", patch)
    kinds = ["inline", "inline", "code_block", "inline", "code_block"]
    assert [kind for kind, _ in blocks(page)] == kinds
    page.encode()


def test_ordinary_text_is_shown_unchanged(monkeypatch):
    text = "ROMEO:\nWhat, ho! \u201cna\u00efve\u201d \U0001f642 \u2014 3 < 4 & *so*\n\n\tJULIET:\n"
    page = page_of("ROMEO:\n", text, monkeypatch)
    assert page.startswith("# Samples\n\n## ROMEO:, temperature 0.5\n\n    ROMEO:\n    ROMEO:\n")
    assert all(f"    {line}\n" in page for line in text.split("\n"))
