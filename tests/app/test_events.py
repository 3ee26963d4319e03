"""What the page's events return, without a server or a browser."""

import re
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from folio.gpt import huggingface
from folio.gpt.model import GPT, ModelParams
from folio.tokens.tokenizer import VOCAB_SIZE


@pytest.fixture(scope="module")
def events() -> Any:
    """Imported here because Gradio takes seconds to import."""
    from folio.app import events

    return events


def save(folder: Path, rows: int) -> str:
    torch.manual_seed(1)
    sizes = ModelParams(n_layer=1, n_head=1, n_embd=8, block_size=8, dropout=0.0)
    huggingface.save(GPT(sizes, rows), folder)
    return str(folder)


@pytest.fixture(scope="module")
def name(tmp_path_factory) -> str:
    return save(tmp_path_factory.mktemp("events") / "gpt2", VOCAB_SIZE)


def test_generate_sends_the_state_once_and_the_probabilities_last(events, name):
    updates = list(events.generate(name, "ROMEO:\n", 1, 0, 1, 20, "1"))
    skip = events.gr.skip()
    assert [update[3] for update in updates[1:]] == [skip] * (len(updates) - 1)
    assert updates[0][0] == "ROMEO:\n"
    assert updates[-1][1].count("<span class='token") == 20 + 4 - 1
    assert "20 tokens" in updates[-1][2]


def test_generate_reports_bad_input_in_the_status(events, tmp_path):
    small = save(tmp_path / "small", 100)
    [update] = events.generate(small, "hello", 1, 0, 1, 3, "")
    assert "vocabulary of 100" in update[2] and update[3] is None


def test_stop_overrides_updates_that_reach_the_page_later(events, name):
    updates = list(events.generate(name, "ROMEO:\n", 1, 0, 1, 20, "1"))
    text, skip = updates[0][3], events.gr.skip()
    stopped = events.stop(text)[2]  # the state from now on: no update replaces it
    content, tokens, line = events.after_stop(stopped, requested=False)
    assert content == updates[-1][0] and tokens == updates[-1][1] and "Stopped: 20 tokens" in line
    # another text was requested in the meantime, and perhaps begun
    for state, requested in ((stopped, True), (text, False), (None, False)):
        assert events.after_stop(state, requested) == (skip,) * 3


def test_stop_before_the_first_token_says_so(events):
    assert "Stopped before the first token" in events.stop(None)[1]


def test_a_failure_is_reported_only_if_the_server_rejected_the_request(events):
    assert "The queue is full: 8 requests are waiting" in events.after_failure(503)[0]
    line, start, stop = events.after_failure(413)
    assert "rejected the request (HTTP status 413)" in line
    assert start["interactive"] and not stop["interactive"]
    # Gradio also reports a failure of a request that was stopped
    assert events.after_failure(200) == events.after_failure(None) == (events.gr.skip(),) * 3


@pytest.mark.parametrize("name", ["x" * 5_000, "~nobody-of-that-name/x", "a\0b", "", None, "/x\n"])
def test_show_model_reports_an_invalid_name_in_one_line(events, name):
    parameters, curve, line = events.show_model(name)
    assert "error" in line and not re.search(r"\n", line)
    assert not parameters["visible"] and not curve["visible"]


def test_show_model_shows_parameters_and_a_missing_history(events, name):
    parameters, curve, line = events.show_model(name)
    assert "1 layers, 1 heads, width 8, context 8" in parameters["value"]
    assert "No training history" in curve["value"] and "error" not in line


def test_generate_reports_a_model_that_computes_no_numbers_in_the_status(events, tmp_path):
    folder = Path(save(tmp_path / "broken", VOCAB_SIZE))
    tensors = safetensors.torch.load_file(folder / "model.safetensors")
    tensors["transformer.ln_f.weight"].fill_(3e38)
    safetensors.torch.save_file(tensors, folder / "model.safetensors")
    for temperature in (0, 1):
        *_, last = events.generate(str(folder), "hello", temperature, 0, 1, 3, "")
        assert "computes values that are NaN or infinite" in last[2] and "error" in last[2]
    tensors["transformer.ln_f.weight"].fill_(float("nan"))
    safetensors.torch.save_file(tensors, folder / "model.safetensors")
    [update] = events.generate(str(folder), "hello", 1, 0, 1, 3, "")
    assert "ln_f.weight has values that are NaN or infinite" in update[2]
