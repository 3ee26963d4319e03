"""What runs only on a GPU: whole trainings with fused kernels, and when they are used."""

from dataclasses import replace

import pytest
import torch
from test_trainer import MODEL, OPTIONS, TRAIN, advance, make_trainer, metrics

from folio.gpt.fused import passes

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")

CUDA = torch.device("cuda")
SIZES = {"n_layer": 2, "n_embd": 64}
ONE, LAST = {"accumulation": 1}, {"keep": "last", "patience": None}
SETTINGS = [ONE, {}, OPTIONS, ONE | LAST | {"gradient_checkpointing": True}]


def trainer(precision="bf16", sizes=SIZES, **options):
    train = replace(TRAIN, **options)
    return make_trainer(replace(MODEL, **sizes), train, precision, where=CUDA)


def evaluate(trainer):
    loss = trainer.validate()
    trainer.early_stopping.update(loss, trainer.steps_done, trainer.weights.state())
    return loss


def test_kernels_are_fused_where_they_support_the_model_and_compile_is_not_never(monkeypatch):
    for compile in ("auto", "always"):
        fused = trainer(compile=compile)
        assert fused.weights.fused and not fused.weights.compiled
        assert fused._machine.endswith(", fused kernels")
    odd = SIZES | {"n_embd": 48}  # 24 channels per head
    for plain in (trainer(compile="never"), trainer("fp32"), trainer(sizes=odd)):
        assert not plain.weights.fused and not plain.weights.compiled
    compiled = trainer(sizes=odd, compile="always")
    assert compiled.weights.compiled and compiled._machine.endswith(", compiled")
    monkeypatch.setattr(passes, "_MAX_CHANNELS", 32)
    assert not trainer().weights.fused


@pytest.mark.parametrize("options", SETTINGS, ids=["one", "two", "options", "last"])
@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_fused_training_resumes_bit_for_bit(tmp_path, precision, options):
    whole, stopped = (trainer(precision, **options) for _ in range(2))
    assert whole.weights.fused
    advance(whole, 2)
    first = evaluate(whole)
    advance(whole, 4)
    advance(stopped, 2)
    assert evaluate(stopped) == first
    advance(stopped, 1)
    stopped.save(tmp_path)
    resumed = trainer(precision, **options)
    resumed.resume(tmp_path)
    advance(resumed, 3)
    assert metrics(resumed) == metrics(whole) and evaluate(resumed) == evaluate(whole)
    for name, weight in whole.model.state_dict().items():
        assert torch.equal(weight, resumed.model.state_dict()[name]), name
        kept = (each.kept_weights[name].cpu() for each in (whole, resumed))
        assert torch.equal(*kept), name


def test_fused_training_resumes_one_with_plain_kernels_and_says_so(tmp_path, capsys):
    sizes = SIZES | {"dropout": 0.0}  # dropout is random in another way
    plain = trainer(sizes=sizes, compile="never", **ONE)
    advance(plain, 3)
    plain.save(tmp_path)
    fused = trainer(sizes=sizes, **ONE)
    fused.resume(tmp_path)
    message = capsys.readouterr().out
    assert ", but this run is" in message and ", fused kernels: the weights will not" in message
    for each in (plain, fused):
        advance(each, 2)
    for ours, theirs in zip(metrics(fused)[3:], metrics(plain)[3:], strict=True):
        assert ours["train_loss"] == pytest.approx(theirs["train_loss"], rel=0.02)
    assert evaluate(fused) == pytest.approx(evaluate(plain), rel=0.02)


def test_graph_that_was_released_is_captured_again_with_the_same_results():
    usual, released = (trainer(**ONE) for _ in range(2))
    advance(usual, 4)
    for _ in range(2):
        advance(released, 2)
        released._step.release_graph()
    assert metrics(released) == metrics(usual)
