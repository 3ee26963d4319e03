"""token_losses scores each token of a text once, given the tokens before it in its window."""

import math

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from folio.gpt.model import GPT, ModelParams
from folio.gpt.validation import token_losses

CONTEXT, ROWS = 8, 60


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(1)
    params = ModelParams(n_layer=2, n_head=2, n_embd=16, block_size=CONTEXT, dropout=0.5)
    model = GPT(params, ROWS)
    with torch.no_grad():
        for p in model.parameters():
            p += 0.3 * torch.randn_like(p)
    return model


def text(length):
    return np.random.default_rng(length).integers(ROWS, size=length).astype(np.uint16)


@torch.no_grad()
def one_by_one(model, tokens, stride):
    """The loss of each token by a separate forward pass, in the first window that contains it."""
    model.eval()
    losses = []
    for i in range(len(tokens) - 1):  # token i is the last input
        window = max(0, math.ceil((i + 1 - CONTEXT) / stride))
        x = torch.from_numpy(tokens[window * stride : i + 1].astype(np.int64))
        assert 1 <= len(x) <= CONTEXT
        losses.append(F.cross_entropy(model(x[None])[0, -1], torch.tensor(int(tokens[i + 1]))))
    return np.array(losses)


@pytest.mark.parametrize("stride", [1, 3, 5, 7, 8])
@pytest.mark.parametrize("length", [2, 5, 8, 9, 10, 16, 17, 18, 24, 25, 41, 47])
def test_token_losses_score_each_token_once_in_its_window(model, length, stride):
    found = token_losses(model, text(length), stride)
    assert found.shape == (length - 1,) and found.dtype == np.float64
    np.testing.assert_allclose(found, one_by_one(model, text(length), stride), rtol=0, atol=1e-5)


@pytest.mark.parametrize("length", [8, 9, 17, 47])
def test_windows_do_not_overlap_by_default(model, length):
    assert np.array_equal(
        token_losses(model, text(length)), token_losses(model, text(length), CONTEXT)
    )


def test_sliding_window_gives_each_token_a_longer_context(model):
    tokens = text(47)
    separate, sliding = token_losses(model, tokens), token_losses(model, tokens, 1)
    np.testing.assert_allclose(separate[:CONTEXT], sliding[:CONTEXT], rtol=0, atol=1e-5)
    full = [i for i in range(CONTEXT, 46) if i % CONTEXT == CONTEXT - 1]  # given a whole context
    np.testing.assert_allclose(separate[full], sliding[full], rtol=0, atol=1e-5)
    others = [i for i in range(CONTEXT, 46) if i not in full]
    assert (np.abs(separate[others] - sliding[others]) > 1e-4).all()


def test_long_text_is_scored_in_several_batches(model):
    tokens = text(400 * CONTEXT + 4)
    windows = torch.from_numpy(tokens[: 400 * CONTEXT + 1].astype(np.int64))
    x, y = windows[:-1].view(400, CONTEXT), windows[1:].view(400, CONTEXT)
    with torch.no_grad():
        logits = model.eval()(x).flatten(0, 1)
    expected = F.cross_entropy(logits, y.flatten(), reduction="none")
    found = token_losses(model, tokens)
    np.testing.assert_allclose(found[:-3], expected, rtol=0, atol=1e-5)
    last = one_by_one(model, tokens[-4:], CONTEXT)
    np.testing.assert_allclose(found[-3:], last, rtol=0, atol=1e-5)


@pytest.mark.parametrize("training", [True, False])
def test_dropout_is_off_and_the_mode_of_the_model_is_restored(model, training):
    expected = token_losses(model.eval(), text(47))
    model.train(training)
    assert np.array_equal(token_losses(model, text(47)), expected)
    assert all(module.training is training for module in model.modules())


def test_training_continues_after_an_evaluation(model):
    token_losses(model.train(), text(47))
    ids = torch.from_numpy(text(9).astype(np.int64))[None]
    model.loss(ids[:, :-1], ids[:, 1:]).backward()
    assert all(p.grad.isfinite().all() for p in model.parameters())
