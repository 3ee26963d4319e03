"""Parameter groups, the optimizers, and the learning rate as a pure function of the step."""

import inspect
import math

import torch


def learning_rate(step: int, peak: float, floor: float, warmup_steps: int, steps: int) -> float:
    """The rate of update number `step` (from 0): a linear warm-up, then a cosine down to floor.

    The update after the warm-up has the peak, and the last of all, number steps - 1, the floor
    (Loshchilov and Hutter 2017, SGDR, eq. 5).
    """
    if step < warmup_steps:
        return peak * (step + 1) / warmup_steps
    progress = min(1.0, (step - warmup_steps) / max(1, steps - 1 - warmup_steps))
    return floor + 0.5 * (peak - floor) * (1 + math.cos(math.pi * progress))


def adamw(
    model: torch.nn.Module, weight_decay: float, betas: tuple[float, float]
) -> torch.optim.AdamW:
    """AdamW (Loshchilov and Hutter 2019) that decays matrices, and neither biases nor norms."""
    params = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in params if p.dim() >= 2], "weight_decay": weight_decay},
        {"params": [p for p in params if p.dim() < 2], "weight_decay": 0.0},
    ]
    kind = params[0].device.type
    fused, capturable = kind in ("cpu", "cuda", "mps"), kind == "cuda"  # see step.py
    return _AdamW(groups, betas=betas, fused=fused, capturable=capturable)


class _AdamW(torch.optim.AdamW):
    """AdamW as it is inside the decorators that keep PyTorch's compiler off it. They import the
    compiler, 1.4 s, and nothing here compiles an optimizer."""

    step = inspect.unwrap(torch.optim.AdamW.step)
    add_param_group = inspect.unwrap(torch.optim.AdamW.add_param_group)
    state_dict = inspect.unwrap(torch.optim.AdamW.state_dict)
    load_state_dict = inspect.unwrap(torch.optim.AdamW.load_state_dict)
