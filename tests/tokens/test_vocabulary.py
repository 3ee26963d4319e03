"""A model with a shared row for unseen tokens equals a GPT-2 in which their rows are equal."""

import numpy as np
import pytest
import torch

from folio.gpt import huggingface
from folio.gpt.model import GPT, ModelParams
from folio.tokens import vocabulary

SIZE = 50_257
PARAMS = ModelParams(n_layer=2, n_head=2, n_embd=32, block_size=24, dropout=0.0)


@pytest.fixture(scope="module")
def text():
    """300 tokens with 40 different ids, no two of which are adjacent."""
    random = np.random.default_rng(1)
    ids = random.choice(SIZE // 2, 40, replace=False) * 2
    return random.choice(ids, 300).astype(np.uint16)


@pytest.fixture(scope="module")
def shared(text):
    return vocabulary.tied_vocabulary(np.bincount(text, minlength=SIZE))


@pytest.fixture(scope="module")
def models(shared, tmp_path_factory):
    """A model with a shared row, and the same model saved with all rows and loaded again."""
    torch.manual_seed(1)
    small = GPT(PARAMS, shared.rows, shared.multiplicity)
    with torch.no_grad():
        for p in small.parameters():
            p += 0.3 * torch.randn_like(p)
    folder = tmp_path_factory.mktemp("models") / "gpt2"
    huggingface.save(small, folder, shared.row)
    return small.eval(), huggingface.load(folder)


def batch(text, unseen):
    """Return token ids x, y [4, 24]; with unseen, every third one can be any id."""
    ids = text[: 4 * 25].astype(np.int64).reshape(4, 25)
    if unseen:
        ids[:, ::3] = np.random.default_rng(2).integers(SIZE, size=ids[:, ::3].shape)
    return ids[:, :-1], ids[:, 1:]


def test_tied_vocabulary_has_a_row_per_occurring_token_and_a_shared_last_row(text, shared):
    occurring = np.unique(text)
    assert shared.rows == len(occurring) + 1
    assert sorted(shared.row[occurring]) == list(range(len(occurring)))
    assert (np.delete(shared.row, occurring) == len(occurring)).all()
    assert np.array_equal(np.bincount(shared.row), shared.multiplicity)
    assert shared.multiplicity.sum() == SIZE


def test_rows_of_returns_uint16_like_token_files(text, shared):
    assert shared.rows_of(text).dtype == np.uint16
    assert np.array_equal(shared.rows_of(text), [shared.row[token] for token in text])


def test_full_vocabulary_leaves_ids_unchanged(text):
    full = vocabulary.full_vocabulary(SIZE)
    assert full.rows == SIZE and full.multiplicity is None
    assert full.rows_of(text) is text
    assert np.array_equal(full.row, np.arange(SIZE))


def test_tied_vocabulary_of_a_text_with_all_tokens_shares_no_row():
    tokens = np.random.default_rng(1).permutation(100).astype(np.uint16)
    found = vocabulary.tied_vocabulary(np.bincount(tokens))
    assert found.multiplicity is None and found.rows == 100
    counts = np.bincount(tokens[1:], minlength=100)
    assert vocabulary.tied_vocabulary(counts).multiplicity.tolist() == [1] * 100


@pytest.mark.parametrize("unseen", [False, True])
def test_token_losses_are_those_of_the_model_with_all_rows(text, shared, models, unseen):
    (small, full), (x, y) = models, batch(text, unseen)
    rows_x, rows_y = (torch.from_numpy(shared.row[ids].astype(np.int64)) for ids in (x, y))
    found = small.token_losses(rows_x, rows_y)
    expected = full.token_losses(torch.from_numpy(x), torch.from_numpy(y))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    if unseen:
        never = np.isin(y, text, invert=True)
        assert never.any() and (found[torch.from_numpy(never)] > 5).all()


@pytest.mark.parametrize("unseen", [False, True])
def test_loss_is_the_same_and_the_shared_row_gets_the_sum_of_the_gradients(
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
    by_row = torch.zeros(
        shared.rows, PARAMS.n_embd, dtype=torch.float64
    )  # one row is a sum of 50,217
    by_row.index_add_(0, row, expected["transformer.wte.weight"].double())
    expected["transformer.wte.weight"] = by_row.float()
    for name, p in small.named_parameters():
        torch.testing.assert_close(p.grad, expected[name], rtol=1e-4, atol=1e-5, msg=name)
