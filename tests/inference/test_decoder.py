"""The decoder computes, token by token, what the model computes for a whole text."""

import copy

import pytest
import torch
from conftest import CONTEXT, ROWS

from folio.gpt.model import KVCache
from folio.inference import decoder
from folio.inference.decoder import Decoder

TOLERANCE = {torch.float32: 2e-5, torch.float16: 2e-2, torch.bfloat16: 2e-1}


def texts():
    return torch.randint(ROWS, (3, CONTEXT), generator=torch.Generator().manual_seed(2))


@pytest.mark.parametrize("length", [1, 5, CONTEXT - 1])
@pytest.mark.parametrize("one_dnn", [True, False])
def test_decoder_agrees_with_the_model(model, length, one_dnn, monkeypatch):
    if not one_dnn:
        monkeypatch.setattr(decoder, "_ONEDNN_LINEAR", None)
    x = texts()
    with torch.inference_mode():
        expected, cache = model.hidden(x), KVCache(model, len(x))
        model.hidden(x[:, :length], cache)
        step_by_step = Decoder(model, cache, lambda hidden: hidden)
        for t in range(length, CONTEXT):
            found = step_by_step.step(x[:, t])
            torch.testing.assert_close(found, expected[:, t], rtol=0, atol=2e-5)
    assert cache.length == CONTEXT


@pytest.mark.parametrize("captured", [True, False], ids=["as captured", "as on a CPU"])
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_decoder_in_half_precision_agrees_with_the_model_in_fp32(model, dtype, captured):
    x, half = texts(), copy.deepcopy(model).to(dtype)
    with torch.inference_mode():
        expected, cache = model.hidden(x), KVCache(half, len(x))
        half.hidden(x[:, :5], cache)
        step_by_step = Decoder(half, cache, lambda hidden: hidden)
        step_by_step.capacity = CONTEXT
        step_by_step.position.fill_(5)
        for t in range(5, CONTEXT):
            step = step_by_step._step_at_position if captured else step_by_step.step
            found = step(x[:, t])
            assert found.dtype == dtype
            apart = (found.float() - expected[:, t]).abs().max()
            assert apart < TOLERANCE[dtype]
