"""The factors of tokens, and AdamW's updates with them."""

import numpy as np
import pytest
import torch

from folio.tokens import tokenizer, vocabulary
from folio.training.adamw import AdamW
from folio.training.factors import Factors


def known(*texts):
    """A vocabulary in which only these tokens have rows of their own."""
    counts = np.bincount([*map(token, texts)], minlength=tokenizer.VOCAB_SIZE)
    return vocabulary.tied_vocabulary(counts)


def token(text):
    [one] = tokenizer.encode(text)
    return one


def table(factors, rows):
    """The weight of each factor for each row: [V, count]."""
    return factors.spread(torch.eye(factors.count))[:rows]


def test_factors_are_the_word_without_case_and_space_and_three_flags():
    texts = ["king", " king", " King", " KING", " queen", "!", " "]
    vocab = known(*texts)
    found = table(Factors(vocab), vocab.rows)
    rows = {text: found[int(vocab.row[token(text)])] for text in texts}
    # One shared word (`king`), a leading space, a capital, capitals only.
    expected = {
        "king": [1, 0, 0, 0], " king": [1, 1, 0, 0], " King": [1, 1, 1, 0], " KING": [1, 1, 0, 1],
        " queen": [0, 1, 0, 0], "!": [0, 0, 0, 0], " ": [0, 1, 0, 0],
    }  # fmt: skip
    for text, factors in expected.items():
        weights = torch.tensor(factors) / max(1, sum(factors)) ** 0.5
        torch.testing.assert_close(rows[text], weights)
    assert not found[-1].any()  # the row of all other tokens


def test_factors_of_the_whole_vocabulary():
    factors = Factors(vocabulary.full_vocabulary(tokenizer.VOCAB_SIZE))
    values = torch.randn(tokenizer.VOCAB_SIZE, 2, generator=torch.Generator().manual_seed(1))
    others = torch.randn(factors.count, 2, generator=torch.Generator().manual_seed(2))
    # `spread` is the transpose of `sum`.
    one, other = (factors.sum(values) * others).sum(), (values * factors.spread(others)).sum()
    torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-2)


@pytest.mark.parametrize("skip", [0.0, 1.0])
def test_adamw_with_factors_is_adamw_for_rows_that_are_sums(skip):
    vocab = known("king", " king", " King", " KING", " queen", "!", " Queen", "abc")
    factors, generator = Factors(vocab), torch.Generator().manual_seed(1)
    matrix = table(factors, vocab.rows)
    start = torch.randn(vocab.rows, 4, generator=generator)
    embedding = torch.nn.Parameter(start.clone())
    own, shared = (
        torch.nn.Parameter(start.clone()),
        torch.nn.Parameter(torch.zeros(factors.count, 4)),
    )
    options = {"betas": (0.9, 0.95), "weight_decay": 0.3}
    ours = AdamW([{"params": [embedding], "weight_decay": 0.3}], (0.9, 0.95), factors, embedding)
    explicit = torch.optim.AdamW([own, shared], lr=0.0, **options)
    for rate in (0.1, 0.05, 0.2):
        gradient = torch.randn(embedding.shape, generator=generator)
        for optimizer in (ours, explicit):
            for group in optimizer.param_groups:
                group["lr"] = rate
        embedding.grad = 4 * gradient
        ours.grad_scale, ours.found_inf = torch.tensor(4.0), torch.tensor(skip)
        ours.step()
        if not skip:
            own.grad, shared.grad = gradient.clone(), matrix.T @ gradient
            explicit.step()
    expected = (own + matrix @ shared).detach()
    torch.testing.assert_close(embedding.detach(), expected, atol=1e-5, rtol=1e-5)
    assert torch.equal(expected, start) == bool(skip)
