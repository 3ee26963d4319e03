"""AdamW (Loshchilov and Hutter 2019), optionally with factored updates of the token embedding."""

import inspect
from typing import Any

import torch

from folio.training.factors import Factors


class AdamW(torch.optim.AdamW):
    """AdamW without PyTorch's decorators, which exclude the optimizer from torch.compile. They
    import the compiler, which takes 1.4 s, although no optimizer is compiled here.

    With factors, a row of the embedding also takes part in the updates of the rows with which it
    shares a factor. This is what AdamW would do if each row were the sum of a vector of its own and
    of a vector for each of its factors, with the same weight decay for all: only the updates of the
    factors' vectors are needed, not the vectors themselves.
    """

    _step = inspect.unwrap(torch.optim.AdamW.step)
    add_param_group = inspect.unwrap(torch.optim.AdamW.add_param_group)
    state_dict = inspect.unwrap(torch.optim.AdamW.state_dict)
    load_state_dict = inspect.unwrap(torch.optim.AdamW.load_state_dict)
    __setstate__ = torch.optim.Optimizer.__setstate__  # Adam's expects its own state of each weight

    def __init__(
        self,
        groups: list[dict[str, Any]],
        betas: tuple[float, float],
        factors: Factors | None = None,
        embedding: torch.nn.Parameter | None = None,
    ):
        """embedding: [V, C], one of the parameters in `groups`; needed only with factors."""
        device = groups[0]["params"][0].device
        fused, capturable = device.type in ("cpu", "cuda", "mps"), device.type == "cuda"
        self._factors = None
        if factors and embedding is not None:
            shape = (factors.count, embedding.shape[1])
            self._updates = torch.nn.Parameter(torch.zeros(shape, device=device))
            groups = [*groups, {"params": [self._updates], "weight_decay": 0.0}]
            self._factors, self._embedding = factors.to(device), embedding
        super().__init__(groups, betas=betas, fused=fused, capturable=capturable)  # see step.py

    @property
    def has_factors(self) -> bool:
        return self._factors is not None

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        if self._factors and self._embedding.grad is not None:
            # AdamW divides gradients by grad_scale in place, so this must come first.
            self._updates.grad = self._factors.sum(self._embedding.grad)
            self._updates.zero_()
        self._step()
        if self._factors:
            self._embedding.add_(self._factors.spread(self._updates))
