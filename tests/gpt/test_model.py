"""GPT-2: its size, initialisation, arithmetic, dropout and gradient checkpointing."""

import dataclasses
import math

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from folio.gpt.model import GPT, KVCache, ModelParams, parameter_counts

TINY = ModelParams(n_layer=2, n_head=2, n_embd=32, block_size=16, dropout=0.0)
ROWS = 97


def gpt(rows=ROWS, multiplicity=None, **changes):
    torch.manual_seed(1)
    return GPT(dataclasses.replace(TINY, **changes), rows, multiplicity)


@torch.no_grad()
def shake(model):
    """Move all parameters, including biases and norms, to values that affect the result."""
    for p in model.parameters():
        p += 0.3 * torch.randn_like(p)
    return model


def ids(batch=3, tokens=TINY.block_size, rows=ROWS):
    return torch.randint(rows, (batch, tokens), generator=torch.Generator().manual_seed(2))


def gradients(model):
    return {name: p.grad for name, p in model.named_parameters()}


# --- size and initialisation


def test_parameter_counts_of_gpt2_small_add_up_to_124_439_808():
    params = ModelParams(n_layer=12, n_head=12, n_embd=768, block_size=1_024, dropout=0.0)
    with torch.device("meta"):
        model = GPT(params, 50_257)
    counts = parameter_counts(model)
    assert counts.pop("total") == sum(counts.values()) == 124_439_808
    assert counts == {
        "token embedding and head": 50_257 * 768,
        "position embedding": 1_024 * 768,
        "attention": 12 * (4 * 768 * 768 + 4 * 768),
        "MLP": 12 * (8 * 768 * 768 + 5 * 768),
        "layer norms": 25 * 2 * 768,
    }


def test_weights_are_initialised_as_in_openais_release():
    model = gpt(rows=1_000, n_layer=4, n_embd=192, block_size=256)
    for name, p in model.named_parameters():
        if name.endswith("bias"):
            assert (p == 0).all(), name
        elif ".ln_" in name:
            assert (p == 1).all(), name
        else:
            std = 0.02 / math.sqrt(2 * 4) if "c_proj" in name else 0.02
            assert p.std().item() == pytest.approx(std, rel=0.03), name
            assert abs(p.mean().item()) < 5 * std / math.sqrt(p.numel()), name


def test_initial_loss_is_about_that_of_a_uniform_distribution():
    model, x, y = gpt(50_257, n_embd=64), ids(8, rows=50_257), ids(8, rows=50_257).flip(0)
    assert model.loss(x, y).item() == pytest.approx(math.log(50_257), abs=0.1)


def test_weights_depend_only_on_the_seed():
    assert torch.equal(gpt().transformer.wpe.weight, gpt().transformer.wpe.weight)


@pytest.mark.parametrize(
    ("n_embd", "n_head", "hint"), [(100, 6, "try 102"), (193, 12, "try 192"), (2, 4, "try 4")]
)
def test_n_embd_not_divisible_by_n_head_is_rejected_with_the_nearest_one(n_embd, n_head, hint):
    with pytest.raises(ValueError, match=f"n_embd: {n_embd} is not divisible by n_head") as error:
        dataclasses.replace(TINY, n_embd=n_embd, n_head=n_head)
    assert str(error.value).endswith(hint)


# --- arithmetic


def test_future_tokens_do_not_change_past_logits():
    model, x = shake(gpt()).eval(), ids()
    before = model(x)
    for t in range(1, TINY.block_size):
        changed = x.clone()
        changed[:, t:] = (changed[:, t:] + 1) % ROWS
        after = model(changed)
        torch.testing.assert_close(after[:, :t], before[:, :t], rtol=0, atol=1e-5)
        assert ((after[:, t] - before[:, t]).abs().amax(-1) > 1e-2).all()


def test_past_tokens_all_change_the_logits():
    model, x = shake(gpt()).eval(), ids()
    before = model(x)[:, -1]
    for t in range(TINY.block_size):
        changed = x.clone()
        changed[:, t] = (changed[:, t] + 1) % ROWS
        assert ((model(changed)[:, -1] - before).abs().amax(-1) > 1e-3).all()


def test_hidden_is_the_same_when_it_fills_a_cache():
    model, x = shake(gpt()).eval(), ids()
    cache = KVCache(model, len(x))
    with torch.inference_mode():
        assert torch.equal(model.hidden(x, cache), model.hidden(x))
    assert cache.length == TINY.block_size


def test_hidden_asserts_that_the_tokens_fit_into_the_context():
    with pytest.raises(AssertionError, match="more tokens than the context"):
        gpt()(ids(tokens=TINY.block_size + 1))


def test_hidden_asserts_that_the_cache_is_empty():
    model = gpt()
    cache = KVCache(model, 1)
    with torch.no_grad():
        model.hidden(ids(1, 2), cache)
        with pytest.raises(AssertionError, match="the cache must be empty"):
            model.hidden(ids(1, 1), cache)


def test_loss_and_token_losses_agree_with_the_logits():
    model, x, y = shake(gpt()).eval(), ids(), ids().flip(0)
    losses = model.token_losses(x, y)
    assert losses.shape == y.shape and not losses.requires_grad
    expected = F.cross_entropy(model(x).flatten(0, 1), y.flatten(), reduction="none").view_as(y)
    torch.testing.assert_close(losses, expected.detach(), rtol=1e-5, atol=1e-5)
    assert model.loss(x, y).item() == pytest.approx(losses.mean().item(), rel=1e-6)


def test_loss_is_the_mean_of_the_token_losses_with_a_shared_row_too():
    multiplicity = np.array([1] * (ROWS - 1) + [900])
    model, x, y = shake(gpt(multiplicity=multiplicity)).eval(), ids(), ids().flip(0)
    y[:, ::4] = ROWS - 1
    losses = model.token_losses(x, y)
    assert model.loss(x, y).item() == pytest.approx(losses.mean().item(), rel=1e-6)
    assert (losses[:, ::4] > math.log(900)).all()  # one of 900 equal tokens has at most 1/900


@pytest.mark.parametrize("distilled", [0.0, 0.8])
def test_targets_are_partly_unseen_tokens_and_what_teachers_predict(distilled):
    m, share = 900, 0.1
    model = shake(gpt(multiplicity=np.array([1] * (ROWS - 1) + [m]))).eval()
    x, y = ids(), ids().flip(0) % (ROWS - 1)
    soft = torch.rand(y.numel(), ROWS, generator=torch.Generator().manual_seed(3))
    soft /= soft.sum(1, keepdim=True)
    model.unseen_probability, model.distill_weight = share, distilled
    teachers = [soft] if distilled else []
    loss = model.loss(x, y, 8.0, *teachers)
    loss.backward()
    assert model.loss(x, y, 2.0**40, *teachers) == loss  # fp16's scale does not round it
    gradients = [p.grad / 8 for p in model.parameters()]
    model.zero_grad()
    # All tokens have logits of their own, and the targets are probabilities.
    weight = model.transformer.wte.weight
    logits = model.hidden(x) @ torch.cat([weight, weight[-1:].expand(m - 1, -1)]).T
    targets = torch.full(logits.shape, share / m)
    targets[..., : ROWS - 1] = (1 - share) * torch.nn.functional.one_hot(y, ROWS - 1)
    each = torch.cat([soft[:, :-1], soft[:, -1:].expand(-1, m) / m], 1)  # token by token
    targets = (1 - distilled) * targets + distilled * each.view(targets.shape)
    expected = -(targets * logits.log_softmax(-1)).sum(-1).mean()
    expected.backward()
    torch.testing.assert_close(loss, expected)
    for p, gradient in zip(model.parameters(), gradients, strict=True):
        torch.testing.assert_close(gradient, p.grad, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("multiplicity", [None, np.array([1] * (ROWS - 1) + [900])])
def test_bf16_changes_loss_and_gradient_by_rounding_only(multiplicity):
    model, x, y = gpt(multiplicity=multiplicity), ids(), ids().flip(0)
    exact = model.loss(x, y)
    exact.backward()
    expected = gradients(model)
    model.zero_grad(set_to_none=True)
    for p in model.parameters():
        p.data = p.data.bfloat16()
    rounded = model.loss(x, y)
    rounded.backward()
    assert rounded.dtype == torch.float32
    assert rounded.item() != exact.item()
    assert rounded.item() == pytest.approx(exact.item(), rel=2e-3)
    both = [torch.cat([g.flatten() for g in d.values()]) for d in (expected, gradients(model))]
    assert F.cosine_similarity(*both, dim=0) > 0.997


# --- dropout and gradient checkpointing


@pytest.mark.parametrize("place", ["embeddings", "attention", "after attention", "after MLP"])
def test_dropout_acts_in_training_mode_only(place):
    plain, model = shake(gpt()), gpt(dropout=0.5)
    for name, p in plain.named_parameters():
        other = {"after attention": "mlp.c_proj", "after MLP": "attn.c_proj"}.get(place, "none")
        if other in name:  # the same module drops its output too: make that zero
            p.detach().zero_()
    model.load_state_dict(plain.state_dict())
    if place != "embeddings":
        model.transformer.drop.p = 0.0
    for block in model.transformer.h:
        if place != "attention":
            block.attn.dropout = 0.0
        if not place.startswith("after"):
            block.drop.p = 0.0
    x = ids()
    assert (model.train()(x) - model(x)).abs().max() > 1e-2
    assert torch.equal(model.eval()(x), plain.eval()(x))


def test_gradient_checkpointing_saves_memory_and_changes_neither_loss_nor_gradient():
    saved = {}  # numbers saved for the backward pass

    def train(gradient_checkpointing):
        model = gpt(dropout=0.2, n_layer=4)
        model.gradient_checkpointing = gradient_checkpointing
        saved[gradient_checkpointing] = 0

        def count(tensor):
            saved[gradient_checkpointing] += tensor.numel()
            return tensor

        torch.manual_seed(3)
        with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
            loss = model.loss(ids(), ids().flip(0))
        loss.backward()
        return loss, gradients(model)

    (expected_loss, expected), (loss, found) = train(False), train(True)
    assert torch.equal(loss, expected_loss)
    for name, gradient in expected.items():
        assert torch.equal(found[name], gradient), name
    assert saved[True] < saved[False] / 4
