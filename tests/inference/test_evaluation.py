"""The metrics of an evaluation and their report; the page of samples."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import CONTEXT, ROWS

from folio.gpt.model import GPT, ModelParams
from folio.gpt.validation import token_losses
from folio.inference.evaluation import (
    EvaluateParams,
    compute_metrics,
    format_report,
    samples_page,
)
from folio.tokens import tokenizer
from folio.tokens.token_files import TokenData

PARAMS = EvaluateParams(
    stride=4,
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
    return TokenData(train=ids[:train_tokens], val=ids[train_tokens:], meta=meta, digest="")


@pytest.fixture(scope="module")
def writer():
    """A model with GPT-2's vocabulary and random weights."""
    torch.manual_seed(1)
    params = ModelParams(n_layer=1, n_head=1, n_embd=4, block_size=16, dropout=0.0)
    return GPT(params, tokenizer.VOCAB_SIZE).eval()


def test_metrics_are_derived_from_the_losses(model):
    tokens = data()
    losses = token_losses(model, tokens.val)
    metrics = compute_metrics(model, tokens, losses, 4)
    assert metrics["val_loss"] == pytest.approx(losses.mean())
    assert metrics["val_loss_per_character"] == pytest.approx(losses.sum() / 170)
    assert metrics["val_bits_per_byte"] == pytest.approx(losses.sum() / math.log(2) / 180)
    assert metrics["val_perplexity"] == pytest.approx(math.exp(losses.mean()))
    sliding = token_losses(model, tokens.val, 4).mean()
    assert metrics["val_loss_sliding"] == pytest.approx(sliding)
    assert metrics["val_loss_sliding"] != pytest.approx(metrics["val_loss"])
    end_of_train = token_losses(model, tokens.train[-50:]).mean()
    assert metrics["train_loss"] == pytest.approx(end_of_train)


def test_perplexity_of_a_huge_loss_is_finite(model):
    metrics = compute_metrics(model, data(), np.full(49, 1e6), CONTEXT)
    assert math.isfinite(metrics["val_perplexity"])


def test_report_shows_every_metric(model):
    tokens = data()
    metrics = compute_metrics(model, tokens, token_losses(model, tokens.val), 4)
    report = format_report(metrics)
    for name, value in metrics.items():
        digits = 1 if name == "val_perplexity" else 4
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
    with pytest.raises(ValueError, match="prompts: one is empty"):
        replace(PARAMS, prompts=["The sea", ""])
