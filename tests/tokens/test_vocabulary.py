"""A row for all tokens that never occur is exactly a GPT-2 in which their rows are equal."""

import numpy as np
import pytest
import torch

from folio.gpt import huggingface
from folio.tokens import vocabulary
from folio.gpt.model import GPT, ModelParams

SIZE = 50_257
PARAMS = ModelParams(n_layer=2, n_head=2, n_embd=32, block_size=24, dropout=0.0)


@pytest.fixture(scope="module")
def text():
    """300 tokens of 40 kinds, none of them neighbours."""
    random = np.random.default_rng(1)
    kinds = random.choice(SIZE // 2, 40, replace=False) * 2
    return random.choice(kinds, 300).astype(np.uint16)


@pytest.fixture(scope="module")
def shared(text):
    return vocabulary.tied_vocabulary(text, SIZE)


@pytest.fixture(scope="module")
def models(shared, tmp_path_factory):
    """A model with a shared row, and the same written out in full and read again."""
    torch.manual_seed(1)
    small = GPT(PARAMS, shared.rows, shared.multiplicity)
    with torch.no_grad():
        for p in small.parameters():
            p += 0.3 * torch.randn_like(p)
    folder = tmp_path_factory.mktemp("models") / "gpt2"
    huggingface.save(small, folder, shared.row)
    return small.eval(), huggingface.load(folder)


def batch(text, unseen):
    """x, y [4, 24] of the whole vocabulary; with unseen, every third token is any at all."""
    ids = text[: 4 * 25].astype(np.int64).reshape(4, 25)
    if unseen:
        ids[:, ::3] = np.random.default_rng(2).integers(SIZE, size=ids[:, ::3].shape)
    return ids[:, :-1], ids[:, 1:]


def test_tokens_that_occur_have_rows_of_their_own_and_the_others_share_the_last(text, shared):
    occurring = np.unique(text)
    assert shared.rows == len(occurring) + 1
    assert sorted(shared.row[occurring]) == list(range(len(occurring)))
    assert (np.delete(shared.row, occurring) == len(occurring)).all()
    assert np.array_equal(np.bincount(shared.row), shared.multiplicity)
    assert shared.multiplicity.sum() == SIZE


def test_rows_of_tokens_fit_a_token_file(text, shared):
    assert shared.rows_of(text).dtype == np.uint16
    assert np.array_equal(shared.rows_of(text), [shared.row[token] for token in text])


def test_where_every_token_has_a_row_ids_stay_as_they_are(text):
    every = vocabulary.full_vocabulary(SIZE)
    assert every.rows == SIZE and every.multiplicity is None
    assert every.rows_of(text) is text
    assert np.array_equal(every.row, np.arange(SIZE))


def test_a_text_of_all_tokens_shares_no_row():
    tokens = np.random.default_rng(1).permutation(100).astype(np.uint16)
    found = vocabulary.tied_vocabulary(tokens, 100)
    assert found.multiplicity is None and found.rows == 100
    assert vocabulary.tied_vocabulary(tokens[1:], 100).multiplicity.tolist() == [1] * 100


@pytest.mark.parametrize("unseen", [False, True])
def test_each_token_loses_what_it_does_in_the_model_written_out(text, shared, models, unseen):
    (small, full), (x, y) = models, batch(text, unseen)
    rows_x, rows_y = (torch.from_numpy(shared.row[ids].astype(np.int64)) for ids in (x, y))
    found = small.token_losses(rows_x, rows_y)
    expected = full.token_losses(torch.from_numpy(x), torch.from_numpy(y))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    if unseen:
        never = np.isin(y, text, invert=True)
        assert never.any() and (found[torch.from_numpy(never)] > 5).all()


@pytest.mark.parametrize("unseen", [False, True])
def test_the_loss_is_the_same_and_a_shared_row_gets_the_gradients_of_all_that_share_it(
    text, shared, models, unseen
):
    (small, full), (x, y) = models, batch(text, unseen)
    for model in models:
        model.zero_grad(set_to_none=True)
    rows_x, rows_y = (torch.from_numpy(shared.row[ids].astype(np.int64)) for ids in (x, y))
    loss = small.loss(rows_x, rows_y)
    full_loss = full.loss(torch.from_numpy(x), torch.from_numpy(y))
    assert loss.item() == pytest.approx(full_loss.item(), abs=1e-5)
    loss.backward(), full_loss.backward()
    expected = {name: p.grad for name, p in full.named_parameters()}
    row = torch.from_numpy(shared.row.astype(np.int64))
    by_row = torch.zeros(shared.rows, PARAMS.n_embd, dtype=torch.float64)  # 50,217 in one sum
    by_row.index_add_(0, row, expected["transformer.wte.weight"].double())
    expected["transformer.wte.weight"] = by_row.float()
    for name, p in small.named_parameters():
        torch.testing.assert_close(p.grad, expected[name], rtol=1e-4, atol=1e-5, msg=name)
