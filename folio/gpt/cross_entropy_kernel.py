"""The softmax of many logits on a GPU: cross-entropy and its gradient, each logit read once.

PyTorch's own operators pass over the logits five times. The kernel keeps the running maximum and
sum (Milakov and Gimelshein 2018, "Online normalizer calculation for softmax", algorithm 3), and
finds a row again in the GPU's cache when it turns it into its gradient.
"""

import torch

from folio import device

if device.can_compile():
    import triton
    from triton import language as tl

_BLOCK, _WARPS = 8192, 32  # logits that a program handles at once, 8 a thread; threads / 32


def cross_entropy_(
    logits: torch.Tensor,
    size: int,
    bias: torch.Tensor | None,
    y: torch.Tensor,
    factor: torch.Tensor,
) -> torch.Tensor:
    """Losses [N] in nats at y [N] of softmax(logits + bias); logits become their gradient.

    logits [N, V] are overwritten by the gradient of the losses' sum times factor, a scalar in fp32.
    Of V only the first `size` are of the vocabulary, those beyond are 0 and stay so. bias [size]
    in fp32, or None.
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
    def _scores(
        logits, bias, start, size, has_bias: tl.constexpr, masked: tl.constexpr, block: tl.constexpr
    ):
        """Eight numbers a thread, from `start` on: [block / 8, 8], and where they are."""
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
    def _join(z, top, total):
        """The maxima and the sums, a thread, with z."""
        higher = tl.maximum(top, tl.max(z, 1))
        return higher, total * tl.exp(top - higher) + tl.sum(tl.exp(z - higher[:, None]), 1)

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
        # A maximum and a sum a thread, as it goes; what the last block counts beyond the vocabulary
        # is lower than any logit, and falls out when all threads are brought to one maximum.
        whole = size // block * block
        top = tl.full([block // 8], -3e38, tl.float32)
        total = tl.zeros([block // 8], tl.float32)
        for start in range(0, whole, block):
            z, _ = _scores(logits, bias, start, size, has_bias, False, block)
            top, total = _join(z, top, total)
        z, last = _scores(logits, bias, whole, size, has_bias, True, block)
        top, total = _join(z, top, total)
        highest = tl.max(top, 0)
        norm = tl.sum(total * tl.exp(top - highest), 0)
        tl.store(losses + row, highest + tl.log(norm) - correct)
        share = factor / norm
        tl.store(
            logits + last, (tl.exp(z - highest) * share).to(logits.dtype.element_ty), last < width
        )
        for start in range(0, whole, block):
            z, column = _scores(logits, bias, start, size, has_bias, False, block)
            gradient = tl.exp(z - highest) * share
            tl.store(logits + column, gradient.to(logits.dtype.element_ty))
        tl.debug_barrier()  # the target's own is written last
        gradient = tl.exp(correct - highest) * share - factor
        tl.store(logits + target, gradient.to(logits.dtype.element_ty))
