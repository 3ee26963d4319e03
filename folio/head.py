"""The output head's cross-entropy, without ever holding all the logits.

At vocabulary 50,257 the logits of 1,024 tokens are 206 MB in fp32, and reading and writing them
costs a CPU as much as the matrix products do. So the head works on a few rows at a time, and forms
its gradient in the forward pass while those rows' logits are at hand (Hsu et al. 2024, "Liger
Kernel", section 3.2, FusedLinearCrossEntropy). The logits are held as [V, R]: on a CPU the product
of the tall weight with few columns is the faster one.
"""

import torch

ROWS = 512  # whose logits are held at once: 103 MB


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, y):
        loss = torch.zeros((), device=x.device)
        x_grad, weight_grad = torch.empty_like(x), torch.zeros_like(weight)
        logits = _buffer(x, weight)
        parts = zip(x.split(ROWS), y.split(ROWS), x_grad.split(ROWS), strict=True)
        for rows, targets, rows_grad in parts:
            exponentials, total, losses = _softmax_parts(rows, weight, bias, targets, logits)
            loss += losses.sum()
            # The gradient of the logits is (softmax - one-hot) / n. Here it is that times n total,
            # which is taken back where the numbers are fewer.
            gradient = exponentials.scatter_add_(0, targets[None], -total[None])
            scale = 1 / (len(y) * total[:, None])
            torch.mm(gradient.T, weight, out=rows_grad).mul_(scale)
            weight_grad.addmm_(gradient, rows * scale)
        ctx.save_for_backward(x_grad, weight_grad)
        return loss / len(y)

    @staticmethod
    def backward(ctx, grad):
        x_grad, weight_grad = ctx.saved_tensors
        return grad * x_grad, grad * weight_grad, None, None


def linear_cross_entropy(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, y: torch.Tensor
) -> torch.Tensor:
    """Mean cross-entropy in nats of softmax(x @ weight.T + bias) at y, with its gradient.

    x [N, C], weight [V, C], bias [V] or None (a constant: it gets no gradient), y [N].
    """
    return _LinearCrossEntropy.apply(x, weight, bias, y)


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


def _buffer(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return torch.empty(len(weight) * min(ROWS, len(x)), dtype=x.dtype, device=x.device)


def _softmax_parts(rows, weight, bias, targets, buffer):
    """exp(logits - their maximum) [V, R], written into buffer; its sums [R]; the losses [R]."""
    logits = buffer[: len(weight) * len(rows)].view(len(weight), len(rows))
    torch.mm(weight, rows.T, out=logits)
    if bias is not None:
        logits += bias[:, None]
    logits -= logits.amax(0)
    correct = logits.gather(0, targets[None])[0]
    total = logits.exp_().sum(0)
    return logits, total, total.log() - correct
