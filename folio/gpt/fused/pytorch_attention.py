"""PyTorch's attention kernels behind the interface of attention.py, to be compared with it.

Only without dropout, whose mask would depend on the state of PyTorch's generator.
"""

import torch

aten = torch.ops.aten


def attend(qkv: torch.Tensor, n_head: int, cudnn: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Like attention.attend, by cuDNN or FlashAttention; logsumexp is a natural logarithm."""
    q, k, v = _heads(qkv, n_head)
    if cudnn:
        out, logsumexp, *_ = aten._scaled_dot_product_cudnn_attention(
            q, k, v, None, True, 0.0, True, False
        )
    else:
        out, logsumexp, *_ = aten._scaled_dot_product_flash_attention(q, k, v, 0.0, True, False)
    return out.transpose(1, 2).flatten(2), logsumexp.view(q.shape[:3])  # from [B, n_head, T, 1]


def attend_backward(
    d_out: torch.Tensor, qkv: torch.Tensor, out: torch.Tensor, logsumexp: torch.Tensor, n_head: int
) -> torch.Tensor:
    """Like attention.attend_backward, by FlashAttention.

    It is reproducible only where torch.are_deterministic_algorithms_enabled().
    """
    q, k, v = _heads(qkv, n_head)
    B, T, C = d_out.shape
    d_out, out = (x.view(B, T, n_head, -1).transpose(1, 2) for x in (d_out, out))
    unused = torch.empty(2, dtype=torch.uint64, device=qkv.device)  # the generator's state
    gradients = aten._scaled_dot_product_flash_attention_backward(
        d_out, q, k, v, out, logsumexp, None, None, T, T, 0.0, True, unused, unused
    )
    return torch.stack([x.transpose(1, 2) for x in gradients], 2).view(B, T, 3 * C)


def _heads(qkv: torch.Tensor, n_head: int) -> tuple[torch.Tensor, ...]:
    """q, k and v, each a view [B, n_head, T, D]."""
    B, T, _ = qkv.shape
    return qkv.view(B, T, 3, n_head, -1).permute(2, 0, 3, 1, 4).unbind()
