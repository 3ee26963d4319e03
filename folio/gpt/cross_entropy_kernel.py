"""Cross-entropy and its gradient in one Triton kernel that reads the logits from memory only once.

PyTorch's own operators make five passes over the logits. The kernel computes a running maximum and
sum of exponentials (Milakov and Gimelshein 2018, "Online normalizer calculation for softmax",
algorithm 3). When it replaces a row with its gradient, the row is still in the GPU's cache.
"""

import math

import torch

from folio import device

if device.can_compile():
    import triton
    from triton import language as tl

    _LOG2_E = tl.constexpr(1 / math.log(2))

# A gradient in e5m2 is that of the losses times this. That is at most 1 by absolute value, and the
# largest number of e5m2 is 57,344, so probabilities down to 2^-31 are not rounded to 0.
FP8_FACTOR = 2.0**15
_BLOCK, _WARPS = 8192, 32  # logits per iteration, 8 per thread; warps of 32 threads per program


def cross_entropy_(
    logits: torch.Tensor,
    size: int,
    bias: torch.Tensor | None,
    y: torch.Tensor,
    factor: torch.Tensor,
    fp8: torch.Tensor | None = None,
) -> torch.Tensor:
    """The losses [N] of softmax(logits + bias) at y [N] in nats. Overwrites logits [N, V].

    logits become the gradient of the sum of the losses, times factor, a scalar in fp32. Only the
    first `size` columns belong to the vocabulary; the others are 0 and stay 0. bias [size] is in
    fp32, or None. fp8 [N, V] in e5m2, if given, becomes the gradient times FP8_FACTOR, not times
    factor. Without Triton or a GPU, PyTorch operators compute the same result.
    """
    if runs_kernel(logits):
        return _launch(logits, size, bias, y, factor, fp8, None, 0.0, 0.0, mixed=False)
    logits = logits[:, :size]
    scores = logits.float() if bias is None else logits.float() + bias
    log_softmax = scores.log_softmax(1)
    losses = -log_softmax.gather(1, y[:, None])[:, 0]
    gradient = log_softmax.exp_()
    gradient[torch.arange(len(y), device=y.device), y] -= 1
    _write_fp8(gradient, fp8)
    logits.copy_(gradient.mul_(factor))
    return losses


def mixed_cross_entropy_(
    logits: torch.Tensor,
    size: int,
    bias: torch.Tensor | None,
    y: torch.Tensor,
    factor: torch.Tensor,
    soft: torch.Tensor | None = None,
    soft_share: float = 0.0,
    last_share: float = 0.0,
    fp8: torch.Tensor | None = None,
) -> torch.Tensor:
    """Like cross_entropy_, but with the targets of GPT.loss, and the losses of tokens, not of rows.

    The targets t are probabilities: `soft` [N, size] has the share soft_share in them, the last row
    the share last_share, and y the rest. A token has the fraction exp(-bias) of the probability of
    its row. The losses are therefore log(sum(exp(logits + bias))) - sum(t * logits).
    """
    if runs_kernel(logits):
        shares = soft_share, last_share
        return _launch(logits, size, bias, y, factor, fp8, soft, *shares, mixed=True)
    logits = logits[:, :size]
    scores = logits.float() if bias is None else logits.float() + bias
    norms = scores.logsumexp(1, keepdim=True)
    targets = torch.zeros_like(scores) if soft is None else soft_share * soft.float()
    targets[torch.arange(len(y), device=y.device), y] += 1 - soft_share - last_share
    targets[:, -1] += last_share
    losses = norms[:, 0] - (targets * logits.float()).sum(1)
    gradient = (scores - norms).exp() - targets
    _write_fp8(gradient, fp8)
    logits.copy_(gradient * factor)
    return losses


def _write_fp8(gradient: torch.Tensor, fp8: torch.Tensor | None) -> None:
    if fp8 is not None:
        fp8[:, : gradient.shape[1]] = (gradient * FP8_FACTOR).to(fp8.dtype)
        fp8[:, gradient.shape[1] :] = 0


def runs_kernel(x: torch.Tensor) -> bool:
    """Whether Triton can run a kernel on a tensor."""
    return device.can_compile() and x.is_cuda


def _launch(
    logits: torch.Tensor,
    size: int,
    bias: torch.Tensor | None,
    y: torch.Tensor,
    factor: torch.Tensor,
    fp8: torch.Tensor | None,
    soft: torch.Tensor | None,
    soft_share: float,
    last_share: float,
    mixed: bool,
) -> torch.Tensor:
    losses = torch.empty(len(y), device=logits.device)
    _cross_entropy[(len(y),)](
        *(logits, bias, y, factor, losses, logits.shape[1], size, fp8),
        *(soft, soft_share, last_share, bias is not None, mixed, soft is not None),
        fp8 is not None,
        block=_BLOCK,
        num_warps=_WARPS,
        maxnreg=32,  # per thread, so that a multiprocessor runs two programs at once
    )
    return losses


if device.can_compile():
    _FP8_FACTOR = tl.constexpr(FP8_FACTOR)

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
    def _exp(x):
        """Of its 5 instructions, tl.exp takes 3 for results below 2^-126, which are 0 here."""
        return tl.exp2(x * _LOG2_E)

    @triton.jit
    def _accumulate(z, maximum, total):
        """Update each thread's running maximum and sum of exponentials with its logits z."""
        higher = tl.maximum(maximum, tl.max(z, 1))
        return higher, total * _exp(maximum - higher) + tl.sum(_exp(z - higher[:, None]), 1)

    @triton.jit
    def _load_soft(soft, column, size):
        return tl.load(soft + column, column < size, other=0.0).to(tl.float32)

    @triton.jit
    def _weighted(z, soft, bias, column, size, has_bias: tl.constexpr):
        """Each thread's sum of its logits z, without bias, weighted by the soft targets."""
        if has_bias:
            z -= tl.load(bias + column, column < size, other=0.0)
        z = tl.where(column < size, z, 0.0)  # beyond the vocabulary they can be infinite
        return tl.sum(z * _load_soft(soft, column, size), 1)

    @triton.jit
    def _cross_entropy(
        logits,
        bias,
        y,
        factor,
        losses,
        width,
        size,
        fp8,
        soft,
        soft_share,
        last_share,
        has_bias: tl.constexpr,
        mixed: tl.constexpr,
        has_soft: tl.constexpr,
        has_fp8: tl.constexpr,
        block: tl.constexpr,
    ):
        row = tl.program_id(0).to(tl.int64)
        logits += row * width
        target = tl.load(y + row)
        correct = tl.load(logits + target).to(tl.float32)
        if has_bias:
            correct += tl.load(bias + target)
        if mixed:
            last_logit = tl.load(logits + size - 1).to(tl.float32)
            if has_bias:
                last_logit += tl.load(bias + size - 1)
        factor = tl.load(factor)
        if has_fp8:
            fp8 += row * width
            to_fp8 = _FP8_FACTOR / factor
        unroll: tl.constexpr = 1 if has_bias or has_soft else 2  # more would not fit in registers
        # Each thread keeps a maximum and a sum. Columns of the last block beyond the vocabulary are
        # lower than any logit, so they vanish when the threads' sums are rescaled to one maximum.
        whole = size // block * block
        maximum = tl.full([block // 8], -3e38, tl.float32)
        total = tl.zeros([block // 8], tl.float32)
        if has_soft:
            soft += row * size
            weighted = tl.zeros([block // 8], tl.float32)
        for start in tl.range(0, whole, block, loop_unroll_factor=unroll):
            z, column = _load(logits, bias, start, size, has_bias, False, block)
            maximum, total = _accumulate(z, maximum, total)
            if has_soft:
                weighted += _weighted(z, soft, bias, column, size, has_bias)
        z, last = _load(logits, bias, whole, size, has_bias, True, block)
        maximum, total = _accumulate(z, maximum, total)
        highest = tl.max(maximum, 0)
        norm = tl.sum(total * _exp(maximum - highest), 0)
        mean = correct
        if mixed:
            mean_last = last_logit
            if has_bias:  # which is not part of the targets' logits
                mean -= tl.load(bias + target)
                mean_last -= tl.load(bias + size - 1)
            mean = (1 - soft_share - last_share) * mean + last_share * mean_last
        if has_soft:
            weighted += _weighted(z, soft, bias, last, size, has_bias)
            mean += soft_share * tl.sum(weighted, 0)
        tl.store(losses + row, highest + tl.log(norm) - mean)
        share = factor / norm
        gradient = _exp(z - highest) * share
        if has_soft:
            gradient -= factor * soft_share * _load_soft(soft, last, size)
        tl.store(logits + last, gradient.to(logits.dtype.element_ty), last < width)
        if has_fp8:
            scaled = (gradient * to_fp8).to(fp8.dtype.element_ty)
            tl.store(fp8 + last, scaled, last < width)
        for start in tl.range(0, whole, block, loop_unroll_factor=unroll):
            z, column = _load(logits, bias, start, size, has_bias, False, block)
            gradient = _exp(z - highest) * share
            if has_soft:
                gradient -= factor * soft_share * _load_soft(soft, column, size)
            tl.store(logits + column, gradient.to(logits.dtype.element_ty))
            if has_fp8:
                tl.store(fp8 + column, (gradient * to_fp8).to(fp8.dtype.element_ty))
        tl.debug_barrier()  # the target's gradient must overwrite what the loops have stored
        gradient = _exp(correct - highest) * share - factor
        if mixed:
            is_last = target == size - 1
            gradient += factor * (soft_share + tl.where(is_last, 0.0, last_share))
            last_gradient = _exp(last_logit - highest) * share - factor * last_share
            if has_soft:
                gradient -= factor * soft_share * tl.load(soft + target).to(tl.float32)
                soft_last = tl.load(soft + size - 1).to(tl.float32)
                last_gradient -= factor * soft_share * soft_last
            if has_fp8:
                scaled = (last_gradient * to_fp8).to(fp8.dtype.element_ty)
                tl.store(fp8 + size - 1, scaled, is_last == 0)
            last_gradient = last_gradient.to(logits.dtype.element_ty)
            tl.store(logits + size - 1, last_gradient, is_last == 0)
        if has_fp8:
            tl.store(fp8 + target, (gradient * to_fp8).to(fp8.dtype.element_ty))
        tl.store(logits + target, gradient.to(logits.dtype.element_ty))
