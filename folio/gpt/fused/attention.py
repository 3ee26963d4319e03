"""Causal self-attention for training in half precision, in Triton.

FlashAttention-2 (Dao 2023) with results that are bitwise reproducible: nothing is added atomically.
The kernels read q, k and v where the projection to 3 C channels wrote them, and write the output
and the gradient in the layouts that the next matrix product reads.

B is the batch size, T the sequence length, C the number of channels, D that of a head.
"""

import math
from dataclasses import dataclass
from typing import Any

import torch

from folio import device

if device.can_compile():
    from folio.gpt.fused.attention_backward import attention_backward, attention_delta
    from folio.gpt.fused.attention_forward import attention_forward

_SHORT = 128  # sequences of up to so many tokens are launch-bound and have other tiles


@dataclass(frozen=True)
class Tile:
    """The shape of a kernel's programs."""

    outer: int  # rows that a program keeps while it loops over the others
    inner: int  # rows per iteration of that loop; a divisor of `outer`
    warps: int
    stages: int  # iterations in flight
    registers: int | None = None  # limit per thread; fewer let more programs share a processor

    def options(self) -> dict[str, Any]:
        """Arguments of a kernel."""
        return {
            "outer": self.outer,
            "inner": self.inner,
            "num_warps": self.warps,
            "num_stages": self.stages,
            "maxnreg": self.registers,
        }


# By direction, whether T is short, and whether D is above 64. benchmarks/attention.py --tune tries
# others.
TILES = {
    ("forward", False, False): Tile(64, 64, 4, 3),
    ("forward", False, True): Tile(128, 64, 8, 3),
    ("forward", True, False): Tile(64, 64, 4, 2),
    ("forward", True, True): Tile(64, 64, 4, 2),
    ("backward", False, False): Tile(64, 64, 4, 2, 168),
    ("backward", False, True): Tile(64, 64, 8, 2),
    ("backward", True, False): Tile(64, 64, 4, 2),
    ("backward", True, True): Tile(64, 64, 8, 2),
}


def supports(n_embd: int, n_head: int, dtype: torch.dtype = torch.bfloat16) -> bool:
    """Whether `attend` works for these sizes and this dtype, on a GPU."""
    size = n_embd // n_head
    return (
        device.can_compile()
        and dtype in (torch.bfloat16, torch.float16)
        and n_embd % n_head == 0
        and size in (16, 32, 64, 128)
    )


def attend(
    qkv: torch.Tensor,
    n_head: int,
    dropout: float,
    seed: torch.Tensor | None,
    tile: Tile | None = None,
    out: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Causal self-attention of n_head heads: the output, and what attend_backward needs.

    qkv [B, T, 3C], contiguous, has the queries, keys and values of all heads one after another.
    dropout: the probability to drop an attention probability; its mask is a function of `seed`, an
    integer tensor with one element on the device, or None without dropout. out: memory for the
    output. Returns out [B, T, C], and the base-2 logarithm of the softmax's sums, [B, n_head, T] in
    fp32.
    """
    B, T, size = _sizes(qkv, n_head)
    tile = tile or TILES["forward", T <= _SHORT, size > 64]
    out = qkv.new_empty(B, T, n_head * size) if out is None else out
    assert out.is_contiguous()
    logsumexp = torch.empty(B, n_head, T, device=qkv.device)
    grid = (B * n_head * math.ceil(T / tile.outer),)
    attention_forward[grid](
        qkv, out, logsumexp, seed if dropout else None, T, n_head, *_numbers(size, dropout),
        masked=T % tile.outer > 0, size=size, **tile.options(),
    )  # fmt: skip
    return out, logsumexp


def attend_backward(
    d_out: torch.Tensor,
    qkv: torch.Tensor,
    out: torch.Tensor,
    logsumexp: torch.Tensor,
    n_head: int,
    dropout: float,
    seed: torch.Tensor | None,
    tile: Tile | None = None,
    d_qkv: torch.Tensor | None = None,
) -> torch.Tensor:
    """The gradient w.r.t. qkv, [B, T, 3C], given that w.r.t. out, [B, T, C], contiguous.

    d_qkv: memory for it. The other arguments are those of `attend` and what it returned.
    """
    B, T, size = _sizes(qkv, n_head)
    assert all(t is None or t.is_contiguous() for t in (d_out, out, logsumexp, d_qkv))
    tile = tile or TILES["backward", T <= _SHORT, size > 64]
    blocks = math.ceil(T / tile.outer)
    masked = T % tile.outer > 0
    fold = T <= _SHORT
    d_qkv, heads = torch.empty_like(qkv) if d_qkv is None else d_qkv, B * n_head
    delta = logsumexp.new_empty(heads, 1 if fold else blocks * tile.outer)
    if not fold:
        attention_delta[(heads * blocks,)](
            out, d_out, delta, T, n_head, masked=masked, size=size, count=tile.outer
        )
    attention_backward[(2 * heads * blocks,)](
        d_out, qkv, out, logsumexp, delta, d_qkv, seed if dropout else None, T, n_head,
        *_numbers(size, dropout),
        masked=masked, fold_delta=fold, size=size, **tile.options(),
    )  # fmt: skip
    return d_qkv


def _sizes(qkv: torch.Tensor, n_head: int) -> tuple[int, int, int]:
    """B, T and D."""
    B, T, width = qkv.shape
    assert qkv.is_contiguous() and width % (3 * n_head) == 0
    return B, T, width // (3 * n_head)


def _numbers(size: int, dropout: float) -> tuple[float, int, float]:
    """scale, threshold and keep_factor (see attention_forward.py)."""
    return math.log2(math.e) * size**-0.5, round(dropout * 2**32) - 2**31, 1 / (1 - dropout)
