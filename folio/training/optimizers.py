"""The optimizers and their parameter groups.

A group may have its own peak learning rate: TrainStep multiplies the scheduled rate by the group's
`lr_scale` (1 by default).
"""

from collections.abc import Iterable

import torch

from folio.errors import UserError
from folio.tokens.vocabulary import Vocabulary
from folio.training.adamw import AdamW
from folio.training.factors import Factors
from folio.training.muon import Muon
from folio.training.params import TrainParams
from folio.training.weights import Weights

_MOMENTUM = 0.95  # of Muon


def build(weights: Weights, p: TrainParams, vocabulary: Vocabulary) -> torch.optim.Optimizer:
    """Build the optimizer described by the `train` section of params.yaml."""
    betas = (p.beta1, p.beta2)
    if p.optimizer == "adamw" and not p.factored_embedding:
        return adamw(weights.parameters, p.weight_decay, betas)
    if weights.mesh:
        raise UserError(
            "train.optimizer muon and train.factored_embedding need whole matrices: set"
            " train.parallel to ddp"
        )
    names = [name for name, _ in weights.model.named_parameters()]
    named = dict(zip(names, weights.parameters, strict=True))
    muon = p.optimizer == "muon"
    matrices = [w for name, w in named.items() if muon and ".h." in name and w.dim() == 2]
    chosen = {id(w) for w in matrices}
    groups = _groups((w for w in weights.parameters if id(w) not in chosen), p.weight_decay)
    if muon:
        options = {"weight_decay": p.muon_weight_decay, "momentum": _MOMENTUM}
        scale = p.muon_learning_rate / p.learning_rate
        groups.append({"params": matrices, "lr_scale": scale, **options})
    factors = Factors(vocabulary) if p.factored_embedding else None
    return (Muon if muon else AdamW)(groups, betas, factors, named["transformer.wte.weight"])


def adamw(
    parameters: Iterable[torch.nn.Parameter], weight_decay: float, betas: tuple[float, float]
) -> AdamW:
    """AdamW, with weight decay on matrices but not biases or norms."""
    return AdamW(_groups(parameters, weight_decay), betas)


def _groups(parameters: Iterable[torch.nn.Parameter], weight_decay: float) -> list[dict]:
    params = [p for p in parameters if p.requires_grad]
    return [
        {"params": [p for p in params if p.dim() >= 2], "weight_decay": weight_decay},
        {"params": [p for p in params if p.dim() < 2], "weight_decay": 0.0},
    ]
