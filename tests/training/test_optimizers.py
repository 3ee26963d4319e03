"""Which parameters decay, and what importing an optimizer costs."""

import subprocess
import sys

import torch

from folio.gpt import huggingface
from folio.gpt.model import GPT, ModelParams
from folio.tokens import tokenizer
from folio.training import optimizers

PARAMS = ModelParams(n_layer=2, n_head=2, n_embd=16, block_size=8, dropout=0.0)


def test_adamw_decays_matrices_but_not_biases_and_norms():
    torch.manual_seed(1)
    model = GPT(PARAMS, 50)
    decaying, others = optimizers.adamw(model.parameters(), 0.3, (0.8, 0.9)).param_groups
    names = {p: name for name, p in model.named_parameters()}
    assert (decaying["weight_decay"], others["weight_decay"]) == (0.3, 0.0)
    assert all(group["betas"] == (0.8, 0.9) for group in (decaying, others))
    assert {names[p].split(".")[-2] for p in decaying["params"]} == {
        "wte", "wpe", "c_attn", "c_proj", "c_fc"
    }  # fmt: skip
    assert all(names[p].endswith("weight") for p in decaying["params"])
    assert all(names[p].endswith("bias") or ".ln_" in names[p] for p in others["params"])


def test_adamw_has_every_parameter_in_one_group():
    model = GPT(PARAMS, 50)
    optimizer = optimizers.adamw(model.parameters(), 0.1, (0.9, 0.95))
    grouped = [id(p) for group in optimizer.param_groups for p in group["params"]]
    assert sorted(grouped) == sorted(id(p) for p in model.parameters())


def test_adamw_only_decays_where_gradient_is_zero():
    torch.manual_seed(1)
    model = GPT(PARAMS, 50)
    optimizer = optimizers.adamw(model.parameters(), 0.5, (0.9, 0.95))
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    for group in optimizer.param_groups:
        group["lr"] = 0.1
    optimizer.step()
    for name, p in model.named_parameters():
        factor = 1 - 0.1 * 0.5 if p.dim() >= 2 else 1.0
        torch.testing.assert_close(p.detach(), factor * before[name])


def test_step_and_load_do_not_import_the_compiler(tmp_path):
    huggingface.save(GPT(PARAMS, tokenizer.VOCAB_SIZE), tmp_path / "model")
    code = f"""
import sys, torch
from pathlib import Path
from folio.gpt import huggingface
from folio.training import optimizers, step
from folio.training.weights import Weights
model = huggingface.load(Path({str(tmp_path / "model")!r})).train()
optimizer = optimizers.adamw(model.parameters(), 0.1, (0.9, 0.95))
x = torch.zeros(1, 4, dtype=torch.long)
take_step = step.TrainStep(Weights(model, "fp32"), optimizer, 1.0)
take_step([(x, x)], 1e-3)
assert take_step.read().steps == 1
optimizer.load_state_dict(optimizer.state_dict())
sys.exit("torch._dynamo" in sys.modules)
"""
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
