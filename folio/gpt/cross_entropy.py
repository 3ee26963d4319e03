"""Fused linear cross-entropy: the output head, its loss and its gradient, chunk by chunk.

With a vocabulary of 50,257, the logits of 1,024 tokens take up 206 MB in fp32, and reading and
writing them costs as much as the matrix products. The head therefore processes a chunk of rows at a
time, and the forward pass computes the gradient while the chunk's logits are in memory (Hsu et al.
2024, "Liger Kernel", section 3.2, FusedLinearCrossEntropy).

N is the number of tokens, R the number in one chunk, C the channels and V the vocabulary size.
"""

from typing import Any

import torch

from folio.gpt import cross_entropy_kernel

CHUNK_ROWS = 512  # rows per chunk on a CPU, and for losses without gradients: 103 MB of logits
GPU_CHUNK_ROWS = 16_384  # rows per chunk when training on a GPU in half precision: 1.6 GB of logits


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        y: torch.Tensor,
        scale: torch.Tensor | float,
    ) -> torch.Tensor:
        transposed = x.device.type == "cpu" and x.dtype.itemsize >= 4
        fused = _loss_and_gradients_transposed if transposed else _loss_and_gradients
        accumulated = torch.promote_types(x.dtype, torch.float32)
        factor = scale * x.new_full((), 1 / len(y), dtype=accumulated)
        loss, *gradients = fused(x, weight, bias, y, factor)
        ctx.save_for_backward(*gradients)
        return loss / len(y)

    @staticmethod
    def backward(ctx: Any, *_: Any) -> tuple[torch.Tensor | None, ...]:
        return *ctx.saved_tensors, None, None, None


class _ScaledGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, scale: torch.Tensor | float) -> torch.Tensor:
        ctx.save_for_backward(scale * x.new_ones(()))
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> tuple[torch.Tensor | None, ...]:
        return gradients[0] * ctx.saved_tensors[0], None


def scale_gradient(x: torch.Tensor, scale: torch.Tensor | float) -> torch.Tensor:
    """Return x, with a gradient that is multiplied by `scale`."""
    return _ScaledGradient.apply(x, scale)


def linear_cross_entropy(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    y: torch.Tensor,
    scale: torch.Tensor | float = 1.0,
) -> torch.Tensor:
    """Mean cross-entropy of softmax(x @ weight.T + bias) at y in nats/token, with its gradient.

    x [N, C], weight [V, C], bias [V] in fp32 or None, y [N]. The bias is a constant and gets no
    gradient. The gradients of x and weight are those of the loss times `scale`. They are computed
    in the forward pass, so call `backward` directly on the result: operations on the loss would not
    affect them.
    """
    return _LinearCrossEntropy.apply(x, weight, bias, y, scale)


@torch.no_grad()
def token_losses(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, y: torch.Tensor
) -> torch.Tensor:
    """The loss of each target in y, [N], in nats. Arguments as in linear_cross_entropy."""
    buffer = _logits_buffer(x, weight)
    return torch.cat(
        [
            _transposed_softmax(rows, weight, bias, targets, buffer)[2]
            for rows, targets in zip(x.split(CHUNK_ROWS), y.split(CHUNK_ROWS), strict=True)
        ]
    )


def _loss_and_gradients(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    y: torch.Tensor,
    factor: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The sum of the losses, and its gradients w.r.t. x [N, C] and weight [V, C] times factor.

    For GPUs or half precision. The logits are [R, V], with V padded to a multiple of 64 by rows of
    zeros: with an odd number of columns, matrix products on a GPU take five times as long.
    """
    size = len(weight)
    weight = torch.nn.functional.pad(weight, (0, 0, 0, -size % 64))
    loss = torch.zeros((), device=x.device)
    x_grad, weight_grad = torch.empty_like(x), torch.empty_like(weight)
    buffer = x.new_empty(min(GPU_CHUNK_ROWS, len(x)), len(weight))
    tensors = (x, y, x_grad)
    chunks = zip(*(tensor.split(GPU_CHUNK_ROWS) for tensor in tensors), strict=True)
    for number, (rows, targets, rows_grad) in enumerate(chunks):
        logits = buffer[: len(rows)]
        torch.mm(rows, weight.T, out=logits)
        loss += cross_entropy_kernel.cross_entropy_(logits, size, bias, targets, factor).sum()
        logits_grad = logits  # which cross_entropy_ has overwritten
        torch.mm(logits_grad, weight, out=rows_grad)
        weight_grad.addmm_(logits_grad.T, rows, beta=min(number, 1))
    return loss, x_grad, weight_grad[:size]


def _loss_and_gradients_transposed(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    y: torch.Tensor,
    factor: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Like _loss_and_gradients, for CPUs in fp32 or fp64.

    The logits are transposed, [V, R]: on a CPU, multiplying the tall weight matrix by a few columns
    is faster than multiplying a few rows by the transposed weight matrix.
    """
    loss = torch.zeros_like(factor)
    x_grad, weight_grad = torch.empty_like(x), torch.zeros_like(weight)
    buffer = _logits_buffer(x, weight)
    chunks = zip(x.split(CHUNK_ROWS), y.split(CHUNK_ROWS), x_grad.split(CHUNK_ROWS), strict=True)
    for rows, targets, rows_grad in chunks:
        exponentials, sums, losses = _transposed_softmax(rows, weight, bias, targets, buffer)
        loss += losses.sum()
        # The gradient w.r.t. the logits is softmax - one_hot(y). Here it is multiplied by `sums`;
        # the division is done later, on rows of C numbers instead of V.
        logits_grad = exponentials.scatter_add_(0, targets[None], -sums[None])
        rows_factor = factor / sums[:, None]
        torch.mm(logits_grad.T, weight, out=rows_grad).mul_(rows_factor)
        weight_grad.addmm_(logits_grad, rows * rows_factor)
    return loss, x_grad, weight_grad


def _logits_buffer(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return torch.empty(len(weight) * min(CHUNK_ROWS, len(x)), dtype=x.dtype, device=x.device)


def _transposed_softmax(
    rows: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    targets: torch.Tensor,
    buffer: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """An unnormalised softmax: exponentials [V, R], their sums [R], and the losses [R].

    The exponentials are a view of `buffer`.
    """
    logits = buffer[: len(weight) * len(rows)].view(len(weight), len(rows))
    # Subtracting the maximum takes two more passes over the logits, which is rarely necessary. A
    # GPU always subtracts it, since testing the sums would make the host wait.
    for subtract_max in (False, True) if rows.device.type == "cpu" else (True,):
        torch.mm(weight, rows.T, out=logits)
        if bias is not None:
            logits += bias[:, None]
        if subtract_max:
            logits -= logits.amax(0)
        target_logits = logits.gather(0, targets[None])[0]
        sums = logits.exp_().sum(0)
        if subtract_max or (sums.min() > 1e-20 and sums.max() < 1e20):
            break
    return logits, sums, sums.log() - target_logits
