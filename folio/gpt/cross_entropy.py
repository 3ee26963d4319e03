"""The output head's cross-entropy, without ever holding all the logits.

At vocabulary 50,257 the logits of 1,024 tokens are 206 MB in fp32, and reading and writing them
costs as much as the matrix products do. So the head works on some rows at a time, and forms its
gradient in the forward pass while those rows' logits are at hand (Hsu et al. 2024, "Liger Kernel",
section 3.2, FusedLinearCrossEntropy).
"""

import torch

from folio.gpt import cross_entropy_kernel

ROWS = 512  # whose logits are held at once: 103 MB; on a CPU, and for losses alone
GPU_ROWS = 16_384  # the same in training on a GPU, in half precision: 1.6 GB


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, y, scale):
        tall = x.device.type == "cpu" and x.dtype.itemsize >= 4
        whole = torch.promote_types(x.dtype, torch.float32)
        factor = scale * x.new_full((), 1 / len(y), dtype=whole)
        loss, *gradients = (_tall if tall else _wide)(x, weight, bias, y, factor)
        ctx.save_for_backward(*gradients)
        return loss / len(y)

    @staticmethod
    def backward(ctx, grad):
        return *ctx.saved_tensors, None, None, None


def linear_cross_entropy(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    y: torch.Tensor,
    scale: torch.Tensor | float = 1.0,
) -> torch.Tensor:
    """Mean cross-entropy in nats of softmax(x @ weight.T + bias) at y, with its gradient.

    x [N, C], weight [V, C], bias [V] or None (a constant in fp32: it gets no gradient), y [N].
    The gradient is scale times the loss's; call backward on the loss as it is, for the gradient is
    there already, and what the loss is multiplied by afterwards does not reach it.
    """
    return _LinearCrossEntropy.apply(x, weight, bias, y, scale)


@torch.no_grad()
def token_losses(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, y: torch.Tensor
) -> torch.Tensor:
    """Cross-entropy in nats at each of y [N]; the arguments are linear_cross_entropy's."""
    logits = _buffer(x, weight)
    return torch.cat(
        [
            _softmax_parts(rows, weight, bias, targets, logits)[2]
            for rows, targets in zip(x.split(ROWS), y.split(ROWS), strict=True)
        ]
    )


def _tall(x, weight, bias, y, factor):
    """The losses' sum, and its gradients by x and weight times factor, with logits as [V, R]: on a
    CPU the product of the tall weight with few columns is the faster one."""
    loss = torch.zeros_like(factor)
    x_grad, weight_grad = torch.empty_like(x), torch.zeros_like(weight)
    logits = _buffer(x, weight)
    parts = zip(x.split(ROWS), y.split(ROWS), x_grad.split(ROWS), strict=True)
    for rows, targets, rows_grad in parts:
        exponentials, total, losses = _softmax_parts(rows, weight, bias, targets, logits)
        loss += losses.sum()
        # The gradient of the logits is softmax - one-hot. Here it is that times total, which is
        # taken back where the numbers are fewer.
        gradient = exponentials.scatter_add_(0, targets[None], -total[None])
        scale = factor / total[:, None]
        torch.mm(gradient.T, weight, out=rows_grad).mul_(scale)
        weight_grad.addmm_(gradient, rows * scale)
    return loss, x_grad, weight_grad


def _wide(x, weight, bias, y, factor):
    """As _tall, with logits as [R, V]. V is made a multiple of 64, by rows of zeros: with an odd
    number of columns a GPU's matrix products take five times as long."""
    size = len(weight)
    weight = torch.nn.functional.pad(weight, (0, 0, 0, -size % 64))
    loss = torch.zeros((), device=x.device)
    x_grad, weight_grad = torch.empty_like(x), torch.empty_like(weight)
    buffer = x.new_empty(min(GPU_ROWS, len(x)), len(weight))
    parts = zip(x.split(GPU_ROWS), y.split(GPU_ROWS), x_grad.split(GPU_ROWS), strict=True)
    for part, (rows, targets, rows_grad) in enumerate(parts):
        logits = buffer[: len(rows)]
        torch.mm(rows, weight.T, out=logits)
        loss += cross_entropy_kernel.cross_entropy_(logits, size, bias, targets, factor).sum()
        torch.mm(logits, weight, out=rows_grad)
        weight_grad.addmm_(logits.T, rows, beta=min(part, 1))
    return loss, x_grad, weight_grad[:size]


def _buffer(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return torch.empty(len(weight) * min(ROWS, len(x)), dtype=x.dtype, device=x.device)


def _softmax_parts(rows, weight, bias, targets, buffer):
    """Numbers in proportion to the softmax [V, R], in buffer; their sums [R]; the losses [R]."""
    logits = buffer[: len(weight) * len(rows)].view(len(weight), len(rows))
    # To take the maximum away before the exponentials is two passes over the logits more than most
    # of them need. A GPU should not wait to be asked.
    for shifted in (False, True) if rows.device.type == "cpu" else (True,):
        torch.mm(weight, rows.T, out=logits)
        if bias is not None:
            logits += bias[:, None]
        if shifted:
            logits -= logits.amax(0)
        correct = logits.gather(0, targets[None])[0]
        total = logits.exp_().sum(0)
        if shifted or (total.min() > 1e-20 and total.max() < 1e20):
            break
    return logits, total, total.log() - correct
