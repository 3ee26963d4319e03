"""Muon: its update, what is left alone, and which weights it gets."""

import copy
from dataclasses import replace

import pytest
import torch
from test_trainer import TRAIN

from folio.errors import UserError
from folio.gpt.model import GPT, ModelParams
from folio.tokens import vocabulary
from folio.training import optimizers
from folio.training.muon import Muon, orthogonalise
from folio.training.weights import Weights

PARAMS = ModelParams(n_layer=2, n_head=2, n_embd=16, block_size=8, dropout=0.0)
WITH_MUON = replace(TRAIN, optimizer="muon", learning_rate=0.01, muon_learning_rate=0.02)


def build(model, params=WITH_MUON):
    known = vocabulary.full_vocabulary(len(model.transformer.wte.weight))
    return optimizers.build(Weights(model, "fp32"), params, known)


@pytest.mark.parametrize("shape", [(3, 8, 8), (2, 24, 8), (2, 8, 32)])
def test_orthogonalise_keeps_the_singular_vectors_and_makes_the_values_about_1(shape):
    matrices = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    result = orthogonalise(matrices)
    u, _, vh = torch.linalg.svd(matrices, full_matrices=False)
    inner = u.mT @ result @ vh.mT
    values = inner.diagonal(dim1=1, dim2=2)
    assert ((values > 0.6) & (values < 1.3)).all()
    torch.testing.assert_close(inner, torch.diag_embed(values), atol=1e-4, rtol=0)


def test_muon_update_is_that_of_its_definition():
    generator = torch.Generator().manual_seed(1)
    weights = [torch.randn(6, 4, generator=generator), torch.randn(4, 4, generator=generator)]
    parameters = [torch.nn.Parameter(w.clone()) for w in weights]
    other = torch.nn.Parameter(torch.zeros(3))
    group = {"params": parameters, "weight_decay": 0.5, "momentum": 0.9}
    muon = Muon([{"params": [other]}, group], (0.9, 0.95))
    momenta = [torch.zeros_like(w) for w in weights]
    for rate in (0.1, 0.05, 0.02):
        gradients = [torch.randn(w.shape, generator=generator) for w in weights]
        for group in muon.param_groups:
            group["lr"] = rate
        for p, gradient in zip(parameters, gradients, strict=True):
            p.grad = 8 * gradient
        muon.grad_scale, muon.found_inf = torch.tensor(8.0), torch.tensor(0.0)
        muon.step()
        for i, gradient in enumerate(gradients):
            momenta[i] = 0.9 * momenta[i] + 0.1 * gradient
            u = orthogonalise((0.1 * gradient + 0.9 * momenta[i])[None])[0]
            scale = max(1, len(u) / len(u[0])) ** 0.5
            weights[i] = (1 - rate * 0.5) * weights[i] - rate * scale * u
    for p, w in zip(parameters, weights, strict=True):
        torch.testing.assert_close(p.detach(), w)
    assert not other.any()


def test_muon_skips_an_update_that_is_not_finite():
    model = GPT(PARAMS, 50)
    optimizer = build(model)
    for value, skip in ((0.1, 0.0), (float("nan"), 1.0)):
        for p in optimizer.param_groups[0]["params"] + optimizer.param_groups[2]["params"]:
            p.grad = torch.full_like(p, value)
        for group in optimizer.param_groups:
            group["lr"] = 0.1
        before = copy.deepcopy((model.state_dict(), optimizer.state_dict()["state"]))
        optimizer.grad_scale, optimizer.found_inf = torch.tensor(1.0), torch.tensor(skip)
        optimizer.step()
        after = model.state_dict(), optimizer.state_dict()["state"]
        same = all(torch.equal(after[0][name], w) for name, w in before[0].items())
        assert same == bool(skip)
    for index, state in before[1].items():
        for name, tensor in state.items():
            assert torch.equal(after[1][index][name], tensor)


def test_muon_gets_the_matrices_of_the_blocks_and_adamw_the_rest():
    model = GPT(PARAMS, 50)
    optimizer = build(model)
    assert sum(len(group["params"]) for group in optimizer.param_groups) == len(
        [*model.parameters()]
    )
    [group] = [group for group in optimizer.param_groups if "momentum" in group]
    names = {p: name for name, p in model.named_parameters()}
    assert {names[p].split(".", 3)[3] for p in group["params"]} == {
        "attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight"
    }  # fmt: skip
    assert len(group["params"]) == 8
    assert (group["lr_scale"], group["weight_decay"]) == (2.0, TRAIN.muon_weight_decay)


@pytest.mark.parametrize("changes", [{"optimizer": "muon"}, {"factored_embedding": True}])
def test_sharded_weights_are_refused_in_one_line(changes):
    weights = Weights(GPT(PARAMS, 50), "fp32")
    weights.mesh = object()
    with pytest.raises(UserError, match="parallel to ddp"):
        optimizers.build(weights, replace(TRAIN, **changes), vocabulary.full_vocabulary(50))
