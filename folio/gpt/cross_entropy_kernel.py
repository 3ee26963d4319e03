"""Cross-entropy and its gradient in one Triton kernel that reads the logits from memory only once.

PyTorch's own operators make five passes over the logits. The kernel computes a running maximum and
sum of exponentials (Milakov and Gimelshein 2018, "Online normalizer calculation for softmax",
algorithm 3). When it replaces a row with its gradient, the row is still in the GPU's cache.
"""

import torch

from folio import device

if device.can_compile():
    import triton
    from triton import language as tl

_BLOCK, _WARPS = 8192, 32  # logits per iteration, 8 per thread; warps of 32 threads per program


def cross_entropy_(
    logits: torch.Tensor,
    size: int,
    bias: torch.Tensor | None,
    y: torch.Tensor,
    factor: torch.Tensor,
) -> torch.Tensor:
    """The losses [N] of softmax(logits + bias) at y [N] in nats. Overwrites logits [N, V].

    logits become the gradient of the sum of the losses, times factor, a scalar in fp32. Only the
    first `size` columns belong to the vocabulary; the others are 0 and stay 0. bias [size] is in
    fp32, or None. Without Triton or a GPU, PyTorch operators compute the same result.
    """
    if device.can_compile() and logits.is_cuda:
        losses = torch.empty(len(y), device=logits.device)
        arguments = (logits, bias, y, factor, losses, logits.shape[1], size)
        has_bias = bias is not None
        _cross_entropy[(len(y),)](*arguments, has_bias=has_bias, block=_BLOCK, num_warps=_WARPS)
        return losses
    logits = logits[:, :size]
    scores = logits.float() if bias is None else logits.float() + bias
    log_softmax = scores.log_softmax(1)
    losses = -log_softmax.gather(1, y[:, None])[:, 0]
    gradient = log_softmax.exp_()
    gradient[torch.arange(len(y), device=y.device), y] -= 1
    logits.copy_(gradient.mul_(factor))
    return losses


if device.can_compile():

    @triton.jit
    def _load(
        logits, bias, start, size, has_bias: tl.constexpr, masked: tl.constexpr, block: tl.constexpr
    ):
        """Load logits + bias, [block / 8, 8], starting at column `start`, and the column numbers.

        Each thread loads 8 of them. If masked, columns from `size` on are set to -3e38.
        """
        column = start + tl.arange(0, block // 8)[:, None] * 8 + tl.arange(0, 8)[None, :]
        if masked:
            inside = column < size
            z = tl.load(logits + column, inside, other=-3e38).to(tl.float32)
            if has_bias:
                z += tl.load(bias + column, inside, other=0.0)
        else:
            z = tl.load(logits + column).to(tl.float32)
            if has_bias:
                z += tl.load(bias + column)
        return z, column

    @triton.jit
    def _accumulate(z, maximum, total):
        """Update each thread's running maximum and sum of exponentials with its logits z."""
        higher = tl.maximum(maximum, tl.max(z, 1))
        return higher, total * tl.exp(maximum - higher) + tl.sum(tl.exp(z - higher[:, None]), 1)

    @triton.jit
    def _cross_entropy(
        logits, bias, y, factor, losses, width, size, has_bias: tl.constexpr, block: tl.constexpr
    ):
        row = tl.program_id(0).to(tl.int64)
        logits += row * width
        target = tl.load(y + row)
        correct = tl.load(logits + target).to(tl.float32)
        if has_bias:
            correct += tl.load(bias + target)
        factor = tl.load(factor)
        # Each thread keeps a maximum and a sum. Columns of the last block beyond the vocabulary are
        # lower than any logit, so they vanish when the threads' sums are rescaled to one maximum.
        whole = size // block * block
        maximum = tl.full([block // 8], -3e38, tl.float32)
        total = tl.zeros([block // 8], tl.float32)
        for start in range(0, whole, block):
            z, _ = _load(logits, bias, start, size, has_bias, False, block)
            maximum, total = _accumulate(z, maximum, total)
        z, last = _load(logits, bias, whole, size, has_bias, True, block)
        maximum, total = _accumulate(z, maximum, total)
        highest = tl.max(maximum, 0)
        norm = tl.sum(total * tl.exp(maximum - highest), 0)
        tl.store(losses + row, highest + tl.log(norm) - correct)
        share = factor / norm
        tl.store(
            logits + last, (tl.exp(z - highest) * share).to(logits.dtype.element_ty), last < width
        )
        for start in range(0, whole, block):
            z, column = _load(logits, bias, start, size, has_bias, False, block)
            gradient = tl.exp(z - highest) * share
            tl.store(logits + column, gradient.to(logits.dtype.element_ty))
        tl.debug_barrier()  # the target's gradient must overwrite what the loops have stored
        gradient = tl.exp(correct - highest) * share - factor
        tl.store(logits + target, gradient.to(logits.dtype.element_ty))
