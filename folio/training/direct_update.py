"""TrainStep's update by the kernels of adamw_kernel.py, which read the gradients of the passes.

It is what `Weights.collect`, `reduce`, TrainStep's own update and `Weights.finish` do otherwise,
for a step of one process with one micro-batch in half precision, and with AdamW. The optimizer's
state is that of torch.optim.AdamW, so checkpoints of either path can be resumed by the other.
"""

import torch

from folio.training.adamw import AdamW
from folio.training.adamw_kernel import AdamWKernel, Parameter
from folio.training.loss_scale import LossScale
from folio.training.weights import Weights


class DirectUpdate:
    """`update(loss)` updates the master weights and their half-precision copy."""

    def __init__(self, weights: Weights, optimizer: torch.optim.Optimizer, state: LossScale):
        self.weights, self.optimizer, self.state = weights, optimizer, state
        self._kernel: AdamWKernel | None = None

    def __call__(self, loss: torch.Tensor) -> None:
        """Update, unless a value is not finite: see check_and_scale. Adds to the stats.

        The first call must not be captured in a CUDA graph, since it copies from the host.
        """
        self._kernel = self._kernel or self._build()
        self._kernel(loss, self.state)

    def reset(self) -> None:
        """Must be called when the optimizer's state has been replaced by other tensors."""
        self._kernel = None

    def _build(self) -> AdamWKernel:
        group = self.optimizer.param_groups[0]
        parameters = []
        copies = self.weights.compute_model.parameters()
        by_parameter = dict(zip(self.weights.parameters, copies, strict=True))
        for each in self.optimizer.param_groups:
            for p in each["params"]:
                copy = by_parameter[p]
                assert copy.grad is not None
                state = self._state(p)
                moments = state["exp_avg"], state["exp_avg_sq"]
                scalars = state["step"], each["lr"], each["weight_decay"]
                parameters.append(Parameter(p.data, *moments, copy.grad, copy.data, *scalars))
        return AdamWKernel(parameters, group["betas"], group["eps"])

    def _state(self, p: torch.nn.Parameter) -> dict[str, torch.Tensor]:
        """The state of a parameter, as torch.optim.AdamW creates it in the first update."""
        state = self.optimizer.state[p]
        if not state:
            state["step"] = torch.zeros((), device=p.device)
            state["exp_avg"] = torch.zeros_like(p, memory_format=torch.preserve_format)
            state["exp_avg_sq"] = torch.zeros_like(p, memory_format=torch.preserve_format)
        return state


def is_possible(weights: Weights, optimizer: torch.optim.Optimizer) -> bool:
    """Whether DirectUpdate computes the same as the optimizer. Muon, factors of the embedding and
    weights of several processes need the gradients in fp32."""
    if not (weights.fused and type(weights) is Weights and type(optimizer) is AdamW):
        return False
    groups = optimizer.param_groups
    same = all(g["betas"] == groups[0]["betas"] and g["eps"] == groups[0]["eps"] for g in groups)
    plain = all(g["capturable"] and not (g["amsgrad"] or g["maximize"]) for g in groups)
    count = sum(len(g["params"]) for g in groups)
    return same and plain and not optimizer.has_factors and count == len(weights.parameters)
