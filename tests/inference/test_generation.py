"""Text from a model: the likeliest, or drawn as the model's probabilities say."""

import numpy as np
import pytest
import torch
from conftest import CONTEXT, ROWS

from folio.inference import generation
from folio.gpt.model import Cache
from folio.inference.generation import Decoder, generate, generate_batch

PROMPT = [3, 1, 4, 1, 5]


def likeliest(model, prompt, tokens):
    """Greedy without a cache."""
    ids = list(prompt)
    with torch.no_grad():
        for _ in range(tokens):
            ids.append(int(model(torch.tensor([ids[-CONTEXT:]]))[0, -1].argmax()))
    return ids[len(prompt) :]


def probabilities(model, prompt, temperature=1.0):
    with torch.no_grad():
        return torch.softmax(model(torch.tensor([prompt]))[0, -1] / temperature, -1)


def draw(model, times, temperature, **choice):
    """How often each id follows the prompt."""
    generator = torch.Generator().manual_seed(7)
    prompts = torch.tensor([PROMPT]).expand(times, -1)
    (ids,) = generate_batch(model, prompts, 1, temperature, generator=generator, **choice)
    return np.bincount(ids, minlength=ROWS)


def assert_drawn_from(counts, p):
    """Within five standard deviations of p [ROWS], and never what has none."""
    p, n = p.double().numpy(), counts.sum()
    assert (np.abs(counts - n * p) <= 5 * np.sqrt(n * p * (1 - p)) + 1e-6).all()


def sample(model, tokens=30, seed=1, temperature=1.0, **choice):
    generator = torch.Generator().manual_seed(seed)
    return list(generate(model, PROMPT, tokens, temperature, generator=generator, **choice))


# --- the likeliest


@pytest.mark.parametrize("length", [1, 5, CONTEXT - 1, CONTEXT, CONTEXT + 1, 3 * CONTEXT])
def test_the_cache_changes_no_text_within_the_context_nor_beyond_it(model, length):
    prompt = np.random.default_rng(length).integers(ROWS, size=length).tolist()
    expected = likeliest(model, prompt, 3 * CONTEXT)
    assert len(set(expected)) > 5
    assert list(generate(model, prompt, 3 * CONTEXT, 0.0)) == expected


@pytest.mark.parametrize("length", [1, 5, CONTEXT - 1])
@pytest.mark.parametrize("one_dnn", [True, False])
def test_the_decoder_is_the_model(model, length, one_dnn, monkeypatch):
    if not one_dnn:
        monkeypatch.setattr(generation, "_ONEDNN", None)
    x = torch.randint(ROWS, (3, CONTEXT), generator=torch.Generator().manual_seed(2))
    with torch.inference_mode():
        expected, cache = model.hidden(x), Cache(model, len(x))
        model.hidden(x[:, :length], cache)
        decoder = Decoder(model, cache, lambda last: last)
        for t in range(length, CONTEXT):
            found = decoder.step(x[:, t])
            torch.testing.assert_close(found, expected[:, t], rtol=0, atol=2e-5)
    assert cache.length == CONTEXT


@pytest.mark.parametrize("length", [1, 5, 3 * CONTEXT])
def test_a_batch_writes_what_each_prompt_alone_does(model, length):
    prompts = np.random.default_rng(length).integers(ROWS, size=(4, length))
    batch = [ids.tolist() for ids in generate_batch(model, torch.tensor(prompts), 20, 0.0)]
    alone = [likeliest(model, prompt.tolist(), 20) for prompt in prompts]
    assert len({tuple(text) for text in alone}) > 1
    assert batch == [list(ids) for ids in zip(*alone, strict=True)]


@pytest.mark.parametrize("length", [5, 3 * CONTEXT])
def test_the_head_reads_the_last_position_alone(model, length, monkeypatch):
    rows, linear = [], generation._linear

    def count(x, weight, bias=None):
        rows.append(len(x)) if len(weight) == ROWS else None
        return linear(x, weight, bias)

    monkeypatch.setattr(generation, "_linear", count)
    monkeypatch.setattr(model, "forward", None)  # its head would read every position
    prompts = torch.ones(2, length, dtype=torch.long)
    assert len(list(generate_batch(model, prompts, CONTEXT, 0.0))) == CONTEXT
    assert rows == CONTEXT * [2]


def test_temperature_0_takes_the_likeliest_whatever_the_seed(model):
    for seed in range(3):
        assert sample(model, seed=seed, temperature=0.0) == likeliest(model, PROMPT, 30)


def test_the_likeliest_of_one_is_the_likeliest(model):
    assert sample(model, top_k=1) == likeliest(model, PROMPT, 30)
    assert sample(model, top_p=1e-6) == likeliest(model, PROMPT, 30)


# --- drawn


def test_ids_are_drawn_as_often_as_the_model_says(model):
    assert_drawn_from(draw(model, 1_000, 1.0), probabilities(model, PROMPT))


def test_temperature_divides_the_logits(model):
    assert_drawn_from(draw(model, 1_000, 2.5), probabilities(model, PROMPT, 2.5))


def test_top_k_draws_among_the_k_likeliest(model):
    p = probabilities(model, PROMPT, 2.5)
    p[p.argsort(descending=True)[4:]] = 0
    counts = draw(model, 500, 2.5, top_k=4)
    assert_drawn_from(counts, p / p.sum())
    assert (counts > 0).sum() == 4


def test_every_prompt_of_a_batch_draws_from_its_own_probabilities(model):
    prompts = torch.tensor([PROMPT, PROMPT[::-1]]).repeat_interleave(1_000, 0)
    generator = torch.Generator().manual_seed(7)
    (ids,) = generate_batch(model, prompts, 1, 2.5, top_k=4, generator=generator)
    for drawn, prompt in zip(ids.view(2, -1), (PROMPT, PROMPT[::-1]), strict=True):
        p = probabilities(model, prompt, 2.5)
        p[p.argsort(descending=True)[4:]] = 0
        assert_drawn_from(np.bincount(drawn, minlength=ROWS), p / p.sum())


def test_top_k_beyond_the_vocabulary_is_no_bound(model):
    assert sample(model, top_k=10 * ROWS) == sample(model)


def test_top_p_draws_among_the_fewest_that_make_up_p(model):
    p = probabilities(model, PROMPT, 2.5)
    order = p.argsort(descending=True)
    top_p = p[order[:5]].sum().item() - p[order[4]].item() / 2  # met by the fifth, not the fourth
    p[order[5:]] = 0
    counts = draw(model, 500, 2.5, top_p=top_p)
    assert_drawn_from(counts, p / p.sum())
    assert (counts > 0).sum() == 5


def test_top_p_of_1_is_no_bound(model):
    assert sample(model, top_p=1.0) == sample(model)


def test_the_same_seed_gives_the_same_text_and_another_seed_another(model):
    first = sample(model)
    torch.manual_seed(123)  # the generator is the only chance there is
    assert sample(model) == first
    assert sample(model, seed=2) != first


# --- its manners


def test_as_many_tokens_come_as_were_asked_for(model):
    assert list(generate(model, PROMPT, 0, 0.0)) == []
    assert len(sample(model, tokens=7)) == 7


def test_tokens_come_one_by_one_and_the_prompt_is_left_alone(model):
    prompt = list(PROMPT)
    stream = generate(model, prompt, 1_000_000_000, 0.0)
    assert [next(stream) for _ in range(3)] == likeliest(model, PROMPT, 3)
    assert prompt == PROMPT
    assert torch.is_grad_enabled() and not torch.is_inference_mode_enabled()


def test_an_empty_prompt_is_a_bug_of_the_caller(model):
    with pytest.raises(AssertionError, match="at least one token"):
        next(generate(model, [], 1, 0.0))
