"""The decoder computes, token by token, what the model computes for a whole text."""

import pytest
import torch
from conftest import CONTEXT, ROWS

from folio.gpt.model import KVCache
from folio.inference import decoder
from folio.inference.decoder import Decoder


@pytest.mark.parametrize("length", [1, 5, CONTEXT - 1])
@pytest.mark.parametrize("one_dnn", [True, False])
def test_decoder_agrees_with_the_model(model, length, one_dnn, monkeypatch):
    if not one_dnn:
        monkeypatch.setattr(decoder, "_ONEDNN_LINEAR", None)
    x = torch.randint(ROWS, (3, CONTEXT), generator=torch.Generator().manual_seed(2))
    with torch.inference_mode():
        expected, cache = model.hidden(x), KVCache(model, len(x))
        model.hidden(x[:, :length], cache)
        step_by_step = Decoder(model, cache, lambda hidden: hidden)
        for t in range(length, CONTEXT):
            found = step_by_step.step(x[:, t])
            torch.testing.assert_close(found, expected[:, t], rtol=0, atol=2e-5)
    assert cache.length == CONTEXT
