"""The optimizers and their parameter groups.

A group may have its own peak learning rate: TrainStep multiplies the scheduled rate by the group's
`lr_scale` (1 by default).
"""

import inspect
from collections.abc import Iterable

import torch

from folio.training.params import TrainParams


def build(parameters: Iterable[torch.nn.Parameter], p: TrainParams) -> torch.optim.Optimizer:
    """Build the optimizer described by the `train` section of params.yaml."""
    return adamw(parameters, p.weight_decay, (p.beta1, p.beta2))


def adamw(
    parameters: Iterable[torch.nn.Parameter], weight_decay: float, betas: tuple[float, float]
) -> torch.optim.AdamW:
    """AdamW (Loshchilov and Hutter 2019), with weight decay on matrices but not biases or norms."""
    params = [p for p in parameters if p.requires_grad]
    groups = [
        {"params": [p for p in params if p.dim() >= 2], "weight_decay": weight_decay},
        {"params": [p for p in params if p.dim() < 2], "weight_decay": 0.0},
    ]
    device = params[0].device.type
    fused, capturable = device in ("cpu", "cuda", "mps"), device == "cuda"  # see step.py
    return _AdamW(groups, betas=betas, fused=fused, capturable=capturable)


class _AdamW(torch.optim.AdamW):
    """AdamW without PyTorch's decorators, which exclude the optimizer from torch.compile. They
    import the compiler, which takes 1.4 s, although no optimizer is compiled here."""

    step = inspect.unwrap(torch.optim.AdamW.step)
    add_param_group = inspect.unwrap(torch.optim.AdamW.add_param_group)
    state_dict = inspect.unwrap(torch.optim.AdamW.state_dict)
    load_state_dict = inspect.unwrap(torch.optim.AdamW.load_state_dict)
