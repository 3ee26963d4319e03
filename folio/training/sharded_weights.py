"""Weights of which each process has a part (fully sharded data parallel).

A module of its own: importing PyTorch's FSDP takes a second, which most runs do not need.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, Shard

from folio.device import can_compile
from folio.distributed import Group
from folio.errors import UserError
from folio.gpt.model import GPT
from folio.training.weights import Tensors, Weights


class ShardedWeights(Weights):
    """Every process has a part of each weight, its gradient and its optimizer state (FSDP; Zhao et
    al. 2023, Rajbhandari et al. 2020, ZeRO-3). A block's weights are gathered when it computes.

    The master weights and the copy in half precision are both sharded, by rows.
    """

    description = ", sharded"

    def __init__(self, model: GPT, precision: str, group: Group):
        super().__init__(model, precision)
        self._group = group
        self.mesh = init_device_mesh(self.device.type, (group.count,))
        self.gradient_factor = group.count  # FSDP averages gradients over processes
        self._sharded: dict[GPT, list[Any]] = {}  # DTensors
        for each in {self.model: None, self.compute_model: None}:
            self._shard(each)
        self._names = [name for name, _ in self.model.named_parameters()]
        self.parameters = [nn.Parameter(p.to_local()) for p in self._sharded[self.model]]

    @property
    def can_capture(self) -> bool:
        return False

    def _shard(self, model: GPT) -> None:
        policy = MixedPrecisionPolicy(reduce_dtype=torch.float32)
        for block in model.transformer.h:
            fully_shard(block, mesh=self.mesh, mp_policy=policy)
        # The master weights have no backward pass, after which FSDP would free the gathered ones.
        free = None if model is self.compute_model else True
        fully_shard(model, mesh=self.mesh, mp_policy=policy, reshard_after_forward=free)
        for method in ("loss", "token_losses"):
            register_fsdp_forward_method(model, method)
        self._sharded[model] = list(model.parameters())  # during a pass there are others

    def compile(self) -> None:
        self.compiled = self.is_half and self.device.type == "cuda" and can_compile()
        if self.compiled:
            for block in self.compute_model.transformer.h.children():
                block.compile(fullgraph=True, dynamic=False)

    def fuse(self, fp8_head: bool = False) -> None:
        """Does nothing: the fused passes need whole weights. Raises UserError if fp8_head."""
        if fp8_head:
            raise UserError(
                "train.fp8_head needs whole weights, but these are sharded: set it to false, or"
                " train.parallel to ddp"
            )

    def begin(self, is_last: bool) -> None:
        model: Any = self.compute_model
        model.set_requires_gradient_sync(is_last)

    @torch.no_grad()
    def collect(self, is_first: bool, is_last: bool) -> None:
        if not is_last:
            return  # FSDP keeps the sum of the gradients so far
        for p, sharded in zip(self.parameters, self._sharded[self.compute_model], strict=True):
            assert sharded.grad is not None
            p.grad = sharded.grad.to_local().float()
            sharded.grad = None

    def reduce(self, loss: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        squared_norm = torch.nn.utils.get_total_norm(self.gradients) ** 2
        loss, squared_norm = self._group.sum_(torch.stack([loss, squared_norm]))
        return loss, squared_norm.sqrt()

    def finish(self) -> None:
        self.sync_from_master()
        for p in self.parameters:
            p.grad = None

    @torch.no_grad()
    def sync_from_master(self) -> None:
        if self.is_half:
            copies = [p.to_local() for p in self._sharded[self.compute_model]]
            torch._foreach_copy_(copies, [*self.parameters])

    def state(self) -> Tensors:
        return {name: p.detach() for name, p in zip(self._names, self.parameters, strict=True)}

    def rows(self) -> list[int]:
        return [len(whole) for whole in self._sharded[self.model]]

    @torch.no_grad()
    def load(self, tensors: Tensors) -> None:
        shapes = {name: p.shape for name, p in self.state().items()}
        if {name: t.shape for name, t in tensors.items()} != shapes:
            raise RuntimeError("the weights are those of a different model")
        for name, p in self.state().items():
            p.copy_(tensors[name])

    def full(self, tensors: Tensors) -> Iterator[tuple[str, torch.Tensor]]:
        for name, whole in zip(self._names, self._sharded[self.model], strict=True):
            part = DTensor.from_local(
                tensors[name], self.mesh, [Shard(0)], shape=whole.shape, stride=whole.stride()
            )
            yield name, part.full_tensor()
