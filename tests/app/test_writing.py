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
    with pytest.raises(UserError, match=r"^the prompt has more than 2,000 characters: shorten it$"):
        writing.start(source, "a" * 2_001, 5, "")


@pytest.mark.parametrize(
    ("length", "shown"),
    [(0, "0"), (-3, "-3"), (1.5, "1.5"), (1_001, "1001"), (1e300, "1e+300"), (None, "empty")],
)
def test_start_rejects_a_length_out_of_range(source, length, shown):
    with pytest.raises(UserError) as problem:
        writing.start(source, "a", length, "")
    expected = f"the length is {shown}: enter a whole number from 1 to 1,000"
    assert str(problem.value) == expected


def test_start_rejects_a_prompt_outside_the_models_vocabulary():
    with pytest.raises(UserError, match="outside this model's vocabulary of 100"):
        writing.start(open_model(100), "hello", 3, "")


@pytest.mark.parametrize("seed", ["0", " 7 ", "9999999999", str(2**63 - 1)])
def test_start_accepts_any_seed_of_63_bits(source, seed):
    text = writing.start(source, "a", 1, seed)
    assert text.seed == int(seed)
    assert len(list(writing.generate(text, 1.0, 0, 1.0))) == 1


@pytest.mark.parametrize("seed", ["-3", "1.5", "x", "1_0", str(2**63), "9" * 5_000])
def test_start_rejects_any_other_seed(source, seed):
    with pytest.raises(UserError) as problem:
        writing.start(source, "a", 1, seed)
    line = str(problem.value)
    assert line.startswith(f"the seed is '{seed[:24]}") and len(line) < 130
    assert "enter a whole number from 0 to 9,223,372,036,854,775,807, or leave it empty" in line


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


def test_generate_uses_the_model_for_generation(monkeypatch):
    source = open_model(tokenizer.VOCAB_SIZE)
    monkeypatch.setattr("folio.inference.precision.resolve_precision", lambda name, where: "bf16")
    used = []
    monkeypatch.setattr(writing.generation, "generate", lambda model, *_: used.append(model) or [])
    list(writing.generate(writing.start(source, "a", 1, "1"), 0, 0, 1))
    assert used == [source.generating] and used != [source.model]


def test_progress_reports_speed_seed_and_a_truncated_prompt(source):
    text = writing.start(source, "a b c d e f g h i j", 1, "1")
    list(writing.generate(text, 0, 0, 1))
    text.seconds, text.stopped = 0.5, True
    assert writing.progress(text) == (
        "Stopped: 1 token, 2 tokens/s, seed 1,"
        " the model sees only the last 8 of the prompt's 10 tokens"
    )
