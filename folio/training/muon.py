"""Muon (Jordan et al. 2024, https://kellerjordan.github.io/posts/muon/) for the blocks' matrices.

It replaces the momentum of a matrix's gradient by the nearest semi-orthogonal matrix, so that all
directions of the matrix change equally fast.
"""

from collections import defaultdict
from typing import Any

import torch

from folio.training.adamw import AdamW

# A quintic iteration that brings all singular values of a matrix near 1 (Jordan et al. 2024).
_A, _B, _C = 3.4445, -4.7750, 2.0315
_ITERATIONS = 5


class Muon(AdamW):
    """Updates the parameter groups that have a `momentum` by Muon, and the others by AdamW.

    Like a fused AdamW, it divides gradients by `grad_scale` and changes nothing if `found_inf`,
    and on a GPU its step can be captured in a CUDA graph.
    """

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        groups = self.param_groups
        self.param_groups = [group for group in groups if "momentum" not in group]
        super().step()
        self.param_groups = groups
        for group in groups:
            if "momentum" in group:
                self._update(group)

    def _update(self, group: dict[str, Any]) -> None:
        by_shape = defaultdict(list)
        for p in group["params"]:
            if p.grad is not None:
                by_shape[p.shape].append(p)
        skip, scale = getattr(self, "found_inf", None), getattr(self, "grad_scale", None)
        for (rows, columns), parameters in by_shape.items():
            weights, buffers = torch.stack(parameters), [self._buffer(p) for p in parameters]
            before = torch.stack(buffers)
            gradients = torch.stack([p.grad for p in parameters])
            if scale is not None:
                gradients /= scale
            momentum = before.lerp(gradients, 1 - group["momentum"])
            direction = orthogonalise(gradients.lerp(momentum, group["momentum"]))  # Nesterov's
            direction *= max(1, rows / columns) ** 0.5
            after = weights * (1 - group["lr"] * group["weight_decay"]) - group["lr"] * direction
            if skip is not None:
                momentum = torch.where(skip > 0, before, momentum)
                after = torch.where(skip > 0, weights, after)
            torch._foreach_copy_(buffers, [*momentum])
            torch._foreach_copy_(parameters, [*after])

    def _buffer(self, p: torch.Tensor) -> torch.Tensor:
        state = self.state[p]
        if not state:
            state["momentum"] = torch.zeros_like(p)
        return state["momentum"]


def orthogonalise(matrices: torch.Tensor) -> torch.Tensor:
    """Return about U V^T for each matrix U S V^T of `matrices`, [N, rows, columns], in fp32.

    The singular values of the results are between about 0.7 and 1.2. On a GPU, computes in bf16.
    """
    x = matrices.bfloat16() if matrices.device.type == "cuda" else matrices
    transposed = x.shape[1] > x.shape[2]
    x = x.mT if transposed else x
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(_ITERATIONS):
        square = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(square, square, square, beta=_B, alpha=_C), x, beta=_A)
    return (x.mT if transposed else x).float()
