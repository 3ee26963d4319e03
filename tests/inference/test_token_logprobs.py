"""token_logprobs agrees with the probabilities of a plain forward pass."""

import numpy as np
import pytest
import torch
from conftest import CONTEXT, ROWS

from folio.inference import token_logprobs as module
from folio.inference.token_logprobs import token_logprobs


def text(tokens):
    return torch.randint(ROWS, (tokens,), generator=torch.Generator().manual_seed(2)).tolist()


@pytest.mark.parametrize("tokens", [2, 5, CONTEXT, CONTEXT + 1])
def test_token_logprobs_agree_with_one_forward_pass(model, tokens):
    ids = text(tokens)
    with torch.no_grad():
        expected = torch.log_softmax(model(torch.tensor([ids[:-1]]))[0], -1)
    found = token_logprobs(model, ids)
    own = expected[range(tokens - 1), ids[1:]]
    np.testing.assert_allclose(found.logprobs, own, rtol=1e-5, atol=1e-4)
    top_logprobs, top_ids = expected.topk(5)
    assert np.array_equal(found.top_ids, top_ids)
    np.testing.assert_allclose(found.top_logprobs, top_logprobs, rtol=1e-5, atol=1e-4)


def test_long_text_is_predicted_from_at_least_three_quarters_of_the_context(model):
    ids = text(5 * CONTEXT)
    found = token_logprobs(model, ids)
    assert found.logprobs.shape == (len(ids) - 1,)
    for i, logprob in enumerate(found.logprobs):
        lengths = range(CONTEXT * 3 // 4 + 1, CONTEXT + 1) if i >= CONTEXT else [i + 1]
        candidates = []
        for length in lengths:
            with torch.no_grad():
                logits = model(torch.tensor([ids[: i + 1][-length:]]))[0, -1]
            candidates.append(float(torch.log_softmax(logits, -1)[ids[i + 1]]))
        assert np.isclose(candidates, logprob, rtol=0, atol=1e-4).any(), i


def test_token_logprobs_are_the_same_with_smaller_chunks(model, monkeypatch):
    ids = text(CONTEXT)
    whole = token_logprobs(model, ids)
    monkeypatch.setattr(module, "_CHUNK_ROWS", 3)
    chunked = token_logprobs(model, ids)
    np.testing.assert_allclose(chunked.logprobs, whole.logprobs, rtol=0, atol=1e-5)
    assert np.array_equal(chunked.top_ids, whole.top_ids)


def test_k_is_at_most_the_size_of_the_vocabulary(model):
    assert token_logprobs(model, text(4), k=99).top_ids.shape == (3, ROWS)
