"""Which precision a model generates in, and that the original model keeps its own."""

import copy

import pytest
import torch

from folio import device
from folio.inference.generation import generate
from folio.inference.precision import in_precision


def test_auto_is_the_model_itself_on_a_cpu(model):
    assert in_precision(model, "auto") is in_precision(model, "fp32") is model


def test_auto_is_a_copy_in_bf16_on_a_gpu_that_supports_it(model, monkeypatch):
    monkeypatch.setattr("folio.inference.precision.resolve_precision", lambda name, where: "bf16")
    half = in_precision(model, "auto")
    assert {p.dtype for p in half.parameters()} == {torch.bfloat16}
    assert in_precision(half, "auto") is half


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_half_precision_generates_text_and_leaves_the_original_as_it_was(model, precision):
    before = copy.deepcopy(model.state_dict())
    half = in_precision(model, precision)
    texts = [
        list(generate(half, [3, 1, 4], 40, 0.8, None, 0.95, torch.Generator().manual_seed(1)))
        for _ in range(2)
    ]
    assert texts[0] == texts[1] and len(set(texts[0])) > 5  # also beyond the context
    assert {p.dtype for p in half.parameters()} == {device.DTYPES[precision]}
    assert not half.training
    assert all(torch.equal(before[name], p) for name, p in model.state_dict().items())
