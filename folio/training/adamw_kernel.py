"""AdamW (Loshchilov and Hutter 2019) in three Triton kernels over all parameters of a model.

The formula is that of torch.optim.AdamW. Its fused version runs a kernel for each group of tensors
and needs gradients in the precision of the weights. These kernels read the half-precision
gradients of the passes, and also write the half-precision copy of the weights:

1. the sum of squares of each chunk of the gradients,
2. the gradient norm, what TrainStep's check_and_scale does with it, and each parameter's step size,
3. the update of each chunk.

Every sum has a fixed order, so results are bitwise reproducible. Nothing waits for the device.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from folio import device
from folio.training.loss_scale import LossScale

if device.can_compile():
    import triton
    from triton import language as tl

    from folio.training.loss_scale import check_and_scale

_CHUNK = 4096  # elements per program
_SUMS = 4096  # of chunks, added up per iteration
_COLUMNS = 8  # of the table of chunks: five addresses, the number of elements, the parameter, 0


@dataclass(frozen=True)
class Parameter:
    """The tensors of one parameter, all contiguous. The last two are scalars."""

    weight: torch.Tensor  # in fp32, as the moments
    exp_avg: torch.Tensor
    exp_avg_sq: torch.Tensor
    gradient: torch.Tensor  # in half precision, as the copy of the weight
    copy: torch.Tensor
    step: torch.Tensor
    learning_rate: torch.Tensor
    weight_decay: float

    @property
    def whole(self) -> tuple[torch.Tensor, ...]:
        """The tensors of the parameter's shape."""
        return self.weight, self.exp_avg, self.exp_avg_sq, self.gradient, self.copy


class AdamWKernel:
    """Updates parameters by their gradients. It stores the addresses of their tensors, so it must
    be replaced when any of these tensors is."""

    def __init__(self, parameters: Sequence[Parameter], betas: tuple[float, float], eps: float):
        self._parameters, self._betas, self._eps = parameters, betas, eps
        where = parameters[0].weight.device
        self._half = parameters[0].gradient.dtype
        tables = [_table(parameters, aligned) for aligned in (True, False)]
        self._tables = [torch.from_numpy(table).to(where) for table in tables]
        self._sums = torch.empty(sum(map(len, tables)), device=where)
        addresses = [[p.step.data_ptr(), p.learning_rate.data_ptr()] for p in parameters]
        self._scalars = torch.tensor(addresses, dtype=torch.int64).to(where)
        self._decays = torch.tensor([p.weight_decay for p in parameters]).to(where)
        # Of each parameter: the decay, the step size, and the inverse of a root (see _coefficients)
        self._coefficients = torch.empty(len(parameters), 4, device=where)
        self._verdict = torch.empty(2, device=where)  # the gradients' factor; whether to skip

    def __call__(self, loss: torch.Tensor, state: LossScale) -> None:
        """Update all parameters and their copies, unless the loss or the gradient is not finite.

        loss: a scalar in fp32. Updates the tensors of `state` as check_and_scale does.
        """
        half, first = _TYPES[self._half], 0
        for table, aligned in zip(self._tables, (True, False), strict=True):
            if len(table):
                sums = self._sums[first:]
                _square_sums[(len(table),)](table, sums, half, aligned, _CHUNK, num_warps=4)
                first += len(table)
        count = len(self._parameters)
        _check_and_scale[(1,)](
            *(self._sums, len(self._sums), loss, *state.arguments),
            *(self._scalars, self._decays, self._coefficients, self._verdict, count),
            *(math.log(self._betas[0]), math.log(self._betas[1]), state.fp16),
            *(_SUMS, triton.next_power_of_2(count)),
            num_warps=8,
        )
        for table, aligned in zip(self._tables, (True, False), strict=True):
            if len(table):
                _update[(len(table),)](
                    *(table, self._coefficients, self._verdict),
                    *(*self._betas, self._eps, half, aligned, _CHUNK),
                    num_warps=8,
                )


def _table(parameters: Sequence[Parameter], aligned: bool) -> np.ndarray:
    """The chunks of aligned parameters, or of the others: [chunks, _COLUMNS] in int64.

    Aligned: the number of elements and all addresses are divisible by 16, so that a thread can load
    16 bytes at once.
    """
    parts = [np.zeros((0, _COLUMNS), np.int64)]
    for number, p in enumerate(parameters):
        assert all(t.is_contiguous() and t.shape == p.weight.shape for t in p.whole)
        addresses = np.array([t.data_ptr() for t in p.whole])
        if aligned == (not (np.append(addresses, p.weight.numel()) % 16).any()):
            first = np.arange(0, p.weight.numel(), _CHUNK)
            part = np.zeros((len(first), _COLUMNS), np.int64)
            part[:, :5] = addresses + first[:, None] * [t.element_size() for t in p.whole]
            part[:, 5] = np.minimum(p.weight.numel() - first, _CHUNK)
            part[:, 6] = number
            parts.append(part)
    return np.concatenate(parts)


if device.can_compile():
    _TYPES = {
        torch.bfloat16: tl.bfloat16,
        torch.float16: tl.float16,
        torch.float32: tl.float32,
    }

    @triton.jit
    def _pointer(address, kind: tl.constexpr, bytes: tl.constexpr):
        """The address as a pointer, which is known to be divisible by `bytes`."""
        return tl.multiple_of(tl.load(address).to(tl.pointer_type(kind)), bytes)

    @triton.jit
    def _count(entry, aligned: tl.constexpr):
        """The number of elements of the chunk, which is divisible by 16 if aligned."""
        return tl.multiple_of(tl.load(entry + 5), 16 if aligned else 1)

    @triton.jit
    def _square_sums(table, sums, half: tl.constexpr, aligned: tl.constexpr, chunk: tl.constexpr):
        # The first chunks come last: they are still in the cache when _update, which starts with
        # them, reads them again.
        row = tl.num_programs(0) - 1 - tl.program_id(0)
        entry = table + row * 8
        gradient = _pointer(entry + 3, half, 16 if aligned else half.primitive_bitwidth // 8)
        at = tl.arange(0, chunk)
        g = tl.load(gradient + at, at < _count(entry, aligned), other=0.0).to(tl.float32)
        tl.store(sums + row, tl.sum(g * g, 0))

    @triton.jit
    def _check_and_scale(
        sums,
        chunks,
        loss,
        stats,
        scale,
        updates,
        grad_clip,
        min_scale,
        double_after,
        scalars,
        decays,
        coefficients,
        verdict,
        parameters,
        log_beta1: tl.constexpr,
        log_beta2: tl.constexpr,
        fp16: tl.constexpr,
        block: tl.constexpr,
        width: tl.constexpr,
    ):
        """One program: check_and_scale, with the gradient norm, and the step sizes."""
        at = tl.arange(0, block)
        squares = tl.zeros([block], tl.float32)
        for start in range(0, chunks, block):
            squares += tl.load(sums + start + at, start + at < chunks, other=0.0)
        norm = tl.sqrt_rn(tl.sum(squares, 0))
        limits = (grad_clip, min_scale, double_after)
        divisor, updated = check_and_scale(norm, loss, stats, scale, updates, *limits, fp16)
        _set_coefficients(
            scalars, decays, coefficients, updated, parameters, log_beta1, log_beta2, width
        )
        tl.store(verdict, 1 / divisor)
        tl.store(verdict + 1, tl.where(updated, 0.0, 1.0))

    @triton.jit
    def _set_coefficients(
        scalars,
        decays,
        coefficients,
        updated,
        parameters,
        log_beta1: tl.constexpr,
        log_beta2: tl.constexpr,
        width: tl.constexpr,
    ):
        """Count the update of each parameter, and store lr * weight_decay, lr / (1 - beta1^step)
        and 1 / sqrt(1 - beta2^step)."""
        p = tl.arange(0, width)
        inside = p < parameters
        counters = tl.load(scalars + 2 * p, inside, other=0).to(tl.pointer_type(tl.float32))
        rates = tl.load(scalars + 2 * p + 1, inside, other=0).to(tl.pointer_type(tl.float32))
        step = tl.load(counters, inside, other=1.0) + tl.where(updated, 1.0, 0.0)
        rate = tl.load(rates, inside, other=0.0)
        tl.debug_barrier()  # all threads must have read the counters
        tl.store(counters, step, inside)
        step = tl.maximum(step, 1.0).to(tl.float64)  # it is 0 if the first update is skipped
        first = 1 - tl.exp(step * log_beta1)
        second = 1 - tl.exp(step * log_beta2)
        row = coefficients + 4 * p
        tl.store(row, rate * tl.load(decays + p, inside, other=0.0), inside)
        tl.store(row + 1, (rate / first).to(tl.float32), inside)
        tl.store(row + 2, (1 / tl.sqrt(second)).to(tl.float32), inside)

    @triton.jit
    def _update(
        table,
        coefficients,
        verdict,
        beta1: tl.constexpr,
        beta2: tl.constexpr,
        eps: tl.constexpr,
        half: tl.constexpr,
        aligned: tl.constexpr,
        chunk: tl.constexpr,
    ):
        if tl.load(verdict + 1) == 0:
            entry = table + tl.program_id(0) * 8
            row = coefficients + 4 * tl.load(entry + 6)
            _update_chunk(entry, row, verdict, beta1, beta2, eps, half, aligned, chunk)

    @triton.jit
    def _update_chunk(
        entry,
        row,
        verdict,
        beta1: tl.constexpr,
        beta2: tl.constexpr,
        eps: tl.constexpr,
        half: tl.constexpr,
        aligned: tl.constexpr,
        chunk: tl.constexpr,
    ):
        # Each thread takes 4 elements at a time of every tensor, 16 bytes in fp32 and 8 in half
        # precision: then no value has to move to another thread.
        bytes: tl.constexpr = 16 if aligned else 4
        half_bytes: tl.constexpr = half.primitive_bitwidth // 8 * (4 if aligned else 1)
        weight = _pointer(entry, tl.float32, bytes)
        exp_avg = _pointer(entry + 1, tl.float32, bytes)
        exp_avg_sq = _pointer(entry + 2, tl.float32, bytes)
        gradient = _pointer(entry + 3, half, half_bytes)
        copy = _pointer(entry + 4, half, half_bytes)
        at = tl.arange(0, chunk)
        mask = at < _count(entry, aligned)
        g = tl.load(gradient + at, mask).to(tl.float32) * tl.load(verdict)
        # The cache keeps what is read again soon: gradients, and copies, by the next forward pass.
        p = tl.load(weight + at, mask, eviction_policy="evict_first")
        m = tl.load(exp_avg + at, mask, eviction_policy="evict_first")
        v = tl.load(exp_avg_sq + at, mask, eviction_policy="evict_first")
        m = beta1 * m + (1 - beta1) * g
        v = beta2 * v + (1 - beta2) * g * g
        p -= tl.load(row) * p
        p -= tl.load(row + 1) * (m / (tl.sqrt(v) * tl.load(row + 2) + eps))
        tl.store(weight + at, p, mask, eviction_policy="evict_first")
        tl.store(exp_avg + at, m, mask, eviction_policy="evict_first")
        tl.store(exp_avg_sq + at, v, mask, eviction_policy="evict_first")
        tl.store(copy + at, p.to(half), mask)
