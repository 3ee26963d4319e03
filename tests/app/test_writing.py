"""Texts as the page generates them: checks of the input, tokens, progress."""

import itertools

import pytest
import torch

from folio.app import writing
from folio.app.models import OpenModel
from folio.errors import UserError
from folio.gpt.model import GPT, ModelParams
from folio.tokens import tokenizer

CONTEXT = 8


def open_model(rows: int) -> OpenModel:
    torch.manual_seed(1)
    sizes = ModelParams(n_layer=1, n_head=1, n_embd=8, block_size=CONTEXT, dropout=0.0)
    return OpenModel("a model", GPT(sizes, rows).eval(), [])


@pytest.fixture(scope="module")
def source() -> OpenModel:
    return open_model(tokenizer.VOCAB_SIZE)


def test_start_begins_with_the_prompt(source):
    text = writing.start(source, "ROMEO:\n", 5, "3")
    assert text.content == "ROMEO:\n" and text.prompt_tokens == len(text.ids) == 4
    assert writing.progress(text) == "0 of 5 tokens, seed 3"


def test_start_replaces_an_empty_prompt_by_a_line_break(source):
    assert writing.start(source, "", 5, "").content == "\n"


def test_start_rejects_a_prompt_that_is_too_long(source):
    with pytest.raises(UserError, match=r"^the prompt has 2,001 characters: .* 2,000$"):
        writing.start(source, "a" * 2_001, 5, "")


def test_start_limits_the_length(source):
    assert writing.start(source, "a", 10_000, "").wanted == writing.MAX_TOKENS


def test_start_rejects_a_prompt_outside_the_models_vocabulary():
    with pytest.raises(UserError, match="outside this model's vocabulary of 100"):
        writing.start(open_model(100), "hello", 3, "")


@pytest.mark.parametrize(("seed", "number"), [("7", 7), ("-1", 2**32 - 1), ("9" * 50, 9999999999)])
def test_start_accepts_any_whole_number_as_seed(source, seed, number):
    assert writing.start(source, "a", 1, seed).seed == number % 2**32


def test_start_rejects_a_seed_that_is_not_a_whole_number(source):
    with pytest.raises(UserError, match=r"^the seed is '1\.5': enter a whole number"):
        writing.start(source, "a", 1, "1.5")


def test_generate_extends_the_text_by_the_wanted_tokens(source):
    text = writing.start(source, "ROMEO:\n", 6, "1")
    contents = list(writing.generate(text, 1.0, 0, 1.0))
    assert len(text.ids) == text.prompt_tokens + 6
    assert contents[-1] == text.content
    assert all(later.startswith(earlier) for earlier, later in itertools.pairwise(contents))


def test_generate_gives_the_same_text_for_the_same_seed(source):
    texts = [writing.start(source, "a", 6, seed) for seed in ("1", "1", "2")]
    for text in texts:
        list(writing.generate(text, 1.0, 0, 1.0))
    assert texts[0].ids == texts[1].ids != texts[2].ids


def test_progress_reports_speed_seed_and_a_truncated_prompt(source):
    text = writing.start(source, "a b c d e f g h i j", 1, "1")
    list(writing.generate(text, 0, 0, 1))
    text.seconds, text.stopped = 0.5, True
    assert writing.progress(text) == (
        "Stopped: 1 tokens, 2 tokens/s, seed 1,"
        " the model sees only the last 8 of the prompt's 10 tokens"
    )
