"""The learning rate as a pure function of the step."""

import math


def learning_rate(step: int, peak: float, floor: float, warmup_steps: int, steps: int) -> float:
    """The learning rate of update number `step`, counted from 0.

    Linear warm-up is followed by cosine decay: the update after the warm-up uses the peak rate, and
    the last one, number steps - 1, uses the floor (Loshchilov and Hutter 2017, SGDR, eq. 5).
    """
    if step < warmup_steps:
        return peak * (step + 1) / warmup_steps
    progress = min(1.0, (step - warmup_steps) / max(1, steps - 1 - warmup_steps))
    return floor + 0.5 * (peak - floor) * (1 + math.cos(math.pi * progress))
