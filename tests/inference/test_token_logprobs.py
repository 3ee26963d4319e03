"""How sure a model is of a text: the probabilities of its own forward pass."""

import numpy as np
import pytest
import torch
from conftest import CONTEXT, ROWS

from folio.inference import token_logprobs as module
from folio.inference.token_logprobs import token_logprobs


def text(tokens):
    return torch.randint(ROWS, (tokens,), generator=torch.Generator().manual_seed(2)).tolist()


@pytest.mark.parametrize("tokens", [2, 5, CONTEXT, CONTEXT + 1])
def test_probabilities_are_those_of_one_forward_pass(model, tokens):
    ids = text(tokens)
    with torch.no_grad():
        expected = torch.softmax(model(torch.tensor([ids[:-1]]))[0], -1)
    found = token_logprobs(model, ids)
    np.testing.assert_allclose(
        found.probability, expected[range(tokens - 1), ids[1:]], rtol=1e-4, atol=1e-7
    )
    likeliest, places = expected.topk(5)
    assert np.array_equal(found.alternatives, places)
    np.testing.assert_allclose(found.probabilities, likeliest, rtol=1e-4, atol=1e-7)


def test_a_long_text_is_judged_by_at_least_three_quarters_of_the_context(model):
    ids = text(5 * CONTEXT)
    found = token_logprobs(model, ids)
    assert found.probability.shape == (len(ids) - 1,)
    for place, probability in enumerate(found.probability):
        givens = range(CONTEXT * 3 // 4 + 1, CONTEXT + 1) if place >= CONTEXT else [place + 1]
        with torch.no_grad():
            near = [
                float(
                    torch.softmax(model(torch.tensor([ids[: place + 1][-given:]]))[0, -1], -1)[
                        ids[place + 1]
                    ]
                )
                for given in givens
            ]
        assert np.isclose(near, probability, rtol=1e-4).any(), place


def test_logits_are_held_a_few_rows_at_a_time_to_the_same_effect(model, monkeypatch):
    ids = text(CONTEXT)
    whole = token_logprobs(model, ids)
    monkeypatch.setattr(module, "_ROWS", 3)
    parts = token_logprobs(model, ids)
    np.testing.assert_allclose(parts.probability, whole.probability, rtol=1e-5)
    assert np.array_equal(parts.alternatives, whole.alternatives)


def test_a_vocabulary_smaller_than_the_alternatives_shows_all_of_it(model):
    assert token_logprobs(model, text(4), k=99).alternatives.shape == (3, ROWS)
