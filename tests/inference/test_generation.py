"""Greedy decoding, and sampling from the probabilities of the model."""

import copy

import numpy as np
import pytest
import torch
from conftest import CONTEXT, ROWS

from folio.errors import UserError
from folio.inference import generation
from folio.inference.generation import generate, generate_batch

PROMPT = [3, 1, 4, 1, 5]


def greedy(model, prompt, tokens):
    """Greedy decoding without a cache."""
    ids = list(prompt)
    with torch.no_grad():
        for _ in range(tokens):
            ids.append(int(model(torch.tensor([ids[-CONTEXT:]]))[0, -1].argmax()))
    return ids[len(prompt) :]


def probabilities(model, prompt, temperature=1.0):
    with torch.no_grad():
        return torch.softmax(model(torch.tensor([prompt]))[0, -1] / temperature, -1)


def draw(model, times, temperature, **options):
    """Draw the next token many times; return how often each id was drawn."""
    generator = torch.Generator().manual_seed(7)
    prompts = torch.tensor([PROMPT]).expand(times, -1)
    (ids,) = generate_batch(model, prompts, 1, temperature, generator=generator, **options)
    return np.bincount(ids, minlength=ROWS)


def assert_drawn_from(counts, p):
    """Assert that counts are within five standard deviations of p [ROWS], and 0 where p is 0."""
    p, n = p.double().numpy(), counts.sum()
    assert (np.abs(counts - n * p) <= 5 * np.sqrt(n * p * (1 - p)) + 1e-6).all()


def sample(model, tokens=30, seed=1, temperature=1.0, **options):
    generator = torch.Generator().manual_seed(seed)
    return list(generate(model, PROMPT, tokens, temperature, generator=generator, **options))


# --- greedy


@pytest.mark.parametrize("length", [1, 5, CONTEXT - 1, CONTEXT, CONTEXT + 1, 3 * CONTEXT])
def test_generate_gives_the_same_text_as_without_a_cache(model, length):
    prompt = np.random.default_rng(length).integers(ROWS, size=length).tolist()
    expected = greedy(model, prompt, 3 * CONTEXT)
    assert len(set(expected)) > 5
    assert list(generate(model, prompt, 3 * CONTEXT, 0.0)) == expected


@pytest.mark.parametrize("length", [1, 5, 3 * CONTEXT])
def test_generate_batch_gives_the_same_texts_as_generate(model, length):
    prompts = np.random.default_rng(length).integers(ROWS, size=(4, length))
    batch = [ids.tolist() for ids in generate_batch(model, torch.tensor(prompts), 20, 0.0)]
    separate = [greedy(model, prompt.tolist(), 20) for prompt in prompts]
    assert len({tuple(text) for text in separate}) > 1
    assert batch == [list(ids) for ids in zip(*separate, strict=True)]


@pytest.mark.parametrize("length", [5, 3 * CONTEXT])
def test_head_is_computed_at_the_last_position_only(model, length, monkeypatch):
    rows, linear = [], generation.linear

    def count(x, weight, bias=None):
        rows.append(len(x)) if len(weight) == ROWS else None
        return linear(x, weight, bias)

    monkeypatch.setattr(generation, "linear", count)
    monkeypatch.setattr(model, "forward", None)  # it computes the head at every position
    prompts = torch.ones(2, length, dtype=torch.long)
    assert len(list(generate_batch(model, prompts, CONTEXT, 0.0))) == CONTEXT
    assert rows == CONTEXT * [2]


def test_temperature_0_is_greedy_with_any_seed(model):
    for seed in range(3):
        assert sample(model, seed=seed, temperature=0.0) == greedy(model, PROMPT, 30)


def test_sampling_from_one_token_is_greedy(model):
    assert sample(model, top_k=1) == greedy(model, PROMPT, 30)
    assert sample(model, top_p=1e-6) == greedy(model, PROMPT, 30)


# --- sampling


def test_sampling_follows_the_probabilities_of_the_model(model):
    assert_drawn_from(draw(model, 1_000, 1.0), probabilities(model, PROMPT))


def test_temperature_divides_the_logits(model):
    assert_drawn_from(draw(model, 1_000, 2.5), probabilities(model, PROMPT, 2.5))


def test_top_k_draws_from_the_k_most_likely_tokens(model):
    p = probabilities(model, PROMPT, 2.5)
    p[p.argsort(descending=True)[4:]] = 0
    counts = draw(model, 500, 2.5, top_k=4)
    assert_drawn_from(counts, p / p.sum())
    assert (counts > 0).sum() == 4


def test_prompts_of_a_batch_draw_from_their_own_probabilities(model):
    prompts = torch.tensor([PROMPT, PROMPT[::-1]]).repeat_interleave(1_000, 0)
    generator = torch.Generator().manual_seed(7)
    (ids,) = generate_batch(model, prompts, 1, 2.5, top_k=4, generator=generator)
    for drawn, prompt in zip(ids.view(2, -1), (PROMPT, PROMPT[::-1]), strict=True):
        p = probabilities(model, prompt, 2.5)
        p[p.argsort(descending=True)[4:]] = 0
        assert_drawn_from(np.bincount(drawn, minlength=ROWS), p / p.sum())


def test_top_k_beyond_the_vocabulary_has_no_effect(model):
    assert sample(model, top_k=10 * ROWS) == sample(model)


def test_top_p_draws_from_the_fewest_tokens_that_add_up_to_p(model):
    p = probabilities(model, PROMPT, 2.5)
    order = p.argsort(descending=True)
    top_p = p[order[:5]].sum().item() - p[order[4]].item() / 2  # reached with the fifth token
    p[order[5:]] = 0
    counts = draw(model, 500, 2.5, top_p=top_p)
    assert_drawn_from(counts, p / p.sum())
    assert (counts > 0).sum() == 5


def test_top_p_of_1_has_no_effect(model):
    assert sample(model, top_p=1.0) == sample(model)


# --- extreme settings

TINY = (5e-324, 1e-300, 1e-50, 1e-30, 1e-10)


@pytest.mark.parametrize("top_p", TINY)
@pytest.mark.parametrize("top_k", [None, 1, 3, 2**63 - 1])
@pytest.mark.parametrize("temperature", [1e-6, 1.0, 1e3])
def test_most_likely_token_is_kept_however_small_top_p_is(model, top_p, top_k, temperature):
    found = sample(model, tokens=20, temperature=temperature, top_k=top_k, top_p=top_p)
    assert found == greedy(model, PROMPT, 20)


@pytest.mark.parametrize("temperature", [*TINY, 1e-7])
def test_tiny_temperature_is_greedy(model, temperature):
    assert sample(model, temperature=temperature) == greedy(model, PROMPT, 30)


@pytest.mark.parametrize("temperature", [1e6, 1e30, 1e38, 1e39, 1e308])
def test_huge_temperature_draws_from_all_tokens_alike(model, temperature):
    counts = draw(model, 2_000, temperature)
    assert_drawn_from(counts, torch.full((ROWS,), 1 / ROWS))


@pytest.mark.parametrize("temperature", [float("nan"), float("inf")])
def test_temperature_must_be_finite(model, temperature):
    with pytest.raises(AssertionError, match="temperature must be a number"):
        sample(model, temperature=temperature)


@pytest.mark.parametrize("top", [1, 4, 1_000])  # tokens that are sorted first
@pytest.mark.parametrize(("top_k", "top_p"), [(None, 0.7), (5, 0.7), (None, 1.0), (3, None)])
def test_samples_are_those_of_the_plain_definition(model, top_k, top_p, top, monkeypatch):
    monkeypatch.setattr(generation, "_TOP", top)
    generator, expected = torch.Generator().manual_seed(1), list(PROMPT)
    for _ in range(30):
        window = expected[-CONTEXT:]
        p, ids = probabilities(model, window).sort(descending=True, stable=True)
        p = p[:top_k] / p[:top_k].sum() if top_k else p
        p = p[p.cumsum(0) - p < top_p] if top_p else p
        expected.append(int(ids[torch.multinomial(p, 1, generator=generator)]))
    assert sample(model, top_k=top_k, top_p=top_p) == expected[len(PROMPT) :]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 3e38])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("name", ["ln_f.weight", "wte.weight"])
def test_values_that_are_not_finite_give_a_one_line_error(model, name, value, temperature):
    broken = copy.deepcopy(model)
    with torch.no_grad():
        broken.transformer.get_parameter(name).fill_(value)
    with pytest.raises(UserError, match="computes values that are NaN or infinite"):
        sample(broken, temperature=temperature)
    prompts = torch.tensor([PROMPT, PROMPT])
    [ids] = generate_batch(broken, prompts, 1, temperature)
    assert ids.tolist() == [generation.NOT_FINITE] * 2


def test_error_of_values_too_large_for_fp16_names_the_other_precisions(model):
    large = copy.deepcopy(model)
    with torch.no_grad():
        large.transformer.ln_f.weight.mul_(1e5)
    assert len(sample(large)) == 30
    with pytest.raises(UserError, match=r"too large for fp16; choose bf16 or fp32$"):
        sample(large.half())


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_values_that_become_infinite_later_give_a_one_line_error(model, temperature):
    broken = copy.deepcopy(model)
    with torch.no_grad():
        broken.transformer.wpe.weight[len(PROMPT) + 2] = float("inf")
    found = []
    with pytest.raises(UserError, match="computes values that are NaN or infinite"):
        for token in generate(broken, PROMPT, 9, temperature):
            found.append(token)
    assert len(found) == 3


def test_text_depends_on_the_seed_of_the_generator_only(model):
    first = sample(model)
    torch.manual_seed(123)  # must have no effect
    assert sample(model) == first
    assert sample(model, seed=2) != first


@pytest.mark.parametrize(("top_k", "top_p"), [(4, None), (None, 0.9), (4, 0.9), (9, 0.1)])
def test_equal_probabilities_are_sorted_by_id(top_k, top_p, monkeypatch):
    monkeypatch.setattr(generation, "_TOP", 4)
    p = torch.tensor([0.01, 0.2, 0.1, 0.1, 0.1, 0.2, 0.1, 0.1, 0.09])
    found, expected = generation._sort(p, top_k, top_p), p.sort(descending=True, stable=True)
    for ours, all_of_them in zip(found, expected, strict=True):
        assert len(ours) > 3 and ours.tolist() == all_of_them[: len(ours)].tolist()
    assert (len(found[0]) < len(p)) == (top_k == 4)


# --- the iterator


def test_generate_yields_the_requested_number_of_tokens(model):
    assert list(generate(model, PROMPT, 0, 0.0)) == []
    assert len(sample(model, tokens=7)) == 7


def test_generate_is_lazy_and_leaves_the_prompt_unchanged(model):
    prompt = list(PROMPT)
    stream = generate(model, prompt, 1_000_000_000, 0.0)
    assert [next(stream) for _ in range(3)] == greedy(model, PROMPT, 3)
    assert prompt == PROMPT
    assert torch.is_grad_enabled() and not torch.is_inference_mode_enabled()


def test_generate_asserts_that_the_prompt_is_not_empty(model):
    with pytest.raises(AssertionError, match="at least one token"):
        next(generate(model, [], 1, 0.0))
