"""A saved folder works in transformers as it is, without any argument."""

import inspect
import logging

import pytest
import torch
import transformers  # imports its models when they are used
from torch.testing import assert_close
from transformers.utils import logging as transformers_logging

from folio.cli.sample import sample
from folio.gpt import huggingface
from folio.gpt.model import GPT, ModelParams
from folio.inference.generation import generate
from folio.tokens import tokenizer

CONTEXT = 24
LONG = "To be, or not to be, that is the question. " * 10
# The pipeline asks for this itself, and then ignores it.
OF_THE_PIPELINE = "Ignoring clean_up_tokenization_spaces=True"


@pytest.fixture(scope="module")
def ours():
    torch.manual_seed(4)
    size = ModelParams(n_layer=2, n_head=2, n_embd=16, block_size=CONTEXT, dropout=0.1)
    model = GPT(size, tokenizer.VOCAB_SIZE).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.3 * torch.randn_like(parameter)
    return model


@pytest.fixture(scope="module")
def folder(ours, tmp_path_factory):
    folder = tmp_path_factory.mktemp("models") / "gpt2"
    huggingface.save(ours, folder)
    return str(folder)


@pytest.fixture(scope="module")
def pipeline(folder):
    return transformers.pipeline("text-generation", folder, device="cpu")


@pytest.fixture
def warnings(recwarn):
    """All that transformers warns about in a test; Python's own warnings become errors."""
    found = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: found.append(record.getMessage())
    transformers_logging.warning_once.cache_clear()  # other tests may have caused the same ones
    logging.getLogger("transformers").addHandler(handler)
    yield found
    logging.getLogger("transformers").removeHandler(handler)
    assert not [str(each.message) for each in recwarn]


def length(text):
    return len(tokenizer.encode(text))


def test_pipeline_without_arguments_fills_the_context(pipeline, warnings):
    torch.manual_seed(1)
    first, second = (pipeline("ROMEO:\n")[0]["generated_text"] for _ in range(2))
    assert first.startswith("ROMEO:\n") and first != second  # it samples
    ids = pipeline("ROMEO:\n", return_tensors=True)[0]["generated_token_ids"]
    assert len(ids) == CONTEXT
    assert [each for each in warnings if not each.startswith(OF_THE_PIPELINE)] == []


def test_batch_of_prompts_is_padded_on_the_left(pipeline, ours, warnings):
    prompts = ["The sea", "ROMEO:\nWhat light through yonder window"]
    assert len(pipeline(prompts, batch_size=2)) == 2
    assert [each for each in warnings if not each.startswith(OF_THE_PIPELINE)] == []
    results = pipeline(prompts, batch_size=2, do_sample=False)
    for prompt, [result] in zip(prompts, results, strict=True):
        ids = tokenizer.encode(prompt).tolist()
        room = CONTEXT - length(prompts[1])  # the longer prompt ends the generation
        text = tokenizer.decode(ids + list(generate(ours, ids, room, temperature=0)))
        assert result["generated_text"] == text


def test_generate_without_arguments_takes_a_padded_batch(folder, warnings):
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    opened = transformers.AutoTokenizer.from_pretrained(folder)
    batch = opened(["The sea", "ROMEO:\nWhat light"], padding=True, return_tensors="pt")
    assert model.generate(**batch).shape == (2, CONTEXT)
    assert warnings == []


def test_truncated_text_has_the_logits_of_its_first_tokens(folder, ours):
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    opened = transformers.AutoTokenizer.from_pretrained(folder)
    inputs = opened(LONG, truncation=True, return_tensors="pt")
    first = torch.from_numpy(tokenizer.encode(LONG)[:CONTEXT].astype("int64"))
    assert_close(model(**inputs).logits, ours(first[None]), rtol=0, atol=1e-4)


def test_pipeline_can_continue_the_end_of_a_text_longer_than_the_context(pipeline, ours):
    settings = {"max_new_tokens": 8, "do_sample": False, "return_full_text": False}
    [result] = pipeline(LONG, handle_long_generation="hole", **settings)
    end = tokenizer.encode(LONG).tolist()[-(CONTEXT - 8) :]
    expected = tokenizer.decode(list(generate(ours, end, 8, temperature=0)))
    assert result["generated_text"] == expected


def test_text_longer_than_the_context_is_an_error(pipeline):
    with pytest.raises(ValueError, match=f"`max_length` is set to {CONTEXT}"):
        pipeline(LONG)
    with pytest.raises(IndexError):
        pipeline("ROMEO:\n", max_new_tokens=CONTEXT)


def test_defaults_are_those_of_sample(folder):
    config = transformers.GenerationConfig.from_pretrained(folder)
    ours = {name: each.default for name, each in inspect.signature(sample).parameters.items()}
    assert (config.temperature, config.top_p) == (ours["temperature"], ours["top_p"])
    assert config.top_k == (ours["top_k"] or 0)
    assert config.max_length == CONTEXT
    special = (config.bos_token_id, config.eos_token_id, config.pad_token_id)
    assert special == (50256, 50256, 50256)


def test_saved_files_are_the_same_each_time(ours, folder, tmp_path):
    huggingface.save(ours, tmp_path / "again")
    for path in (tmp_path / "again").iterdir():
        assert path.read_bytes() == (tmp_path / folder / path.name).read_bytes()
