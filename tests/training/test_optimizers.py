"""The learning rate update by update, and who decays."""

import math
import subprocess
import sys

import pytest
import torch

from folio.gpt import huggingface
from folio.tokens import tokenizer
from folio.training import optimizers, schedule
from folio.gpt.model import GPT, ModelParams

PARAMS = ModelParams(n_layer=2, n_head=2, n_embd=16, block_size=8, dropout=0.0)


def rates(peak=1.0, floor=0.1, warmup_steps=4, steps=13):
    return [schedule.learning_rate(n, peak, floor, warmup_steps, steps) for n in range(steps)]


def test_the_warm_up_is_linear_and_its_last_update_has_the_peak():
    assert rates()[:4] == [0.25, 0.5, 0.75, 1.0]


def test_after_the_warm_up_it_is_a_cosine():
    found = rates()
    assert found[4] == 1.0
    assert found[6] == pytest.approx(0.55 + 0.45 * math.sqrt(0.5))
    assert found[8] == pytest.approx(0.55)  # half-way
    assert found[10] == pytest.approx(0.55 - 0.45 * math.sqrt(0.5))
    assert found[4:] == sorted(found[4:], reverse=True)


@pytest.mark.parametrize("steps", [13, 600, 100_000])
def test_the_last_update_has_the_floor_exactly(steps):
    assert schedule.learning_rate(steps - 1, 2e-3, 1e-4, 4, steps) == 1e-4
    assert schedule.learning_rate(steps - 2, 2e-3, 1e-4, 4, steps) > 1e-4


def test_beyond_the_last_update_the_floor_holds():
    assert schedule.learning_rate(13, 1.0, 0.1, 4, 13) == 0.1
    assert schedule.learning_rate(1_000_000, 1.0, 0.1, 4, 13) == 0.1


def test_without_a_warm_up_it_starts_at_the_peak():
    assert rates(warmup_steps=0)[0] == 1.0
    assert rates(warmup_steps=0, steps=1) == [1.0]


def test_a_warm_up_longer_than_the_training_never_reaches_the_peak():
    assert rates(warmup_steps=8, steps=4) == [0.125, 0.25, 0.375, 0.5]


def test_matrices_decay_and_biases_and_norms_do_not():
    torch.manual_seed(1)
    model = GPT(PARAMS, 50)
    decaying, others = optimizers.adamw(model, 0.3, (0.8, 0.9)).param_groups
    names = {p: name for name, p in model.named_parameters()}
    assert (decaying["weight_decay"], others["weight_decay"]) == (0.3, 0.0)
    assert all(group["betas"] == (0.8, 0.9) for group in (decaying, others))
    assert {names[p].split(".")[-2] for p in decaying["params"]} == {
        "wte", "wpe", "c_attn", "c_proj", "c_fc"
    }  # fmt: skip
    assert all(names[p].endswith("weight") for p in decaying["params"])
    assert all(names[p].endswith("bias") or ".ln_" in names[p] for p in others["params"])


def test_every_parameter_is_in_exactly_one_group():
    model = GPT(PARAMS, 50)
    optimizer = optimizers.adamw(model, 0.1, (0.9, 0.95))
    grouped = [id(p) for group in optimizer.param_groups for p in group["params"]]
    assert sorted(grouped) == sorted(id(p) for p in model.parameters())


def test_without_a_gradient_decay_alone_moves_a_matrix():
    torch.manual_seed(1)
    model = GPT(PARAMS, 50)
    optimizer = optimizers.adamw(model, 0.5, (0.9, 0.95))
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    for group in optimizer.param_groups:
        group["lr"] = 0.1
    optimizer.step()
    for name, p in model.named_parameters():
        factor = 1 - 0.1 * 0.5 if p.dim() >= 2 else 1.0
        torch.testing.assert_close(p.detach(), factor * before[name])


def test_neither_a_step_nor_a_model_that_is_opened_waits_for_pytorch_s_compiler(tmp_path):
    huggingface.save(GPT(PARAMS, tokenizer.VOCAB_SIZE), tmp_path / "model")
    code = f"""
import sys, torch
from pathlib import Path
from folio.gpt import huggingface
from folio.training import optimizers, schedule, step
model = huggingface.load(Path({str(tmp_path / "model")!r})).train()
optimizer = optimizers.adamw(model, 0.1, (0.9, 0.95))
x = torch.zeros(1, 4, dtype=torch.long)
take_step = step.Step(model, optimizer, torch.device("cpu"), "fp32", 1.0)
take_step([(x, x)], 1e-3)
assert take_step.read().steps == 1
optimizer.load_state_dict(optimizer.state_dict())
sys.exit("torch._dynamo" in sys.modules)
"""
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
