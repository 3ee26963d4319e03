"""The fused linear cross-entropy agrees with PyTorch's, and never has all logits in memory."""

import pytest
import torch
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from folio.gpt import cross_entropy_kernel
from folio.gpt.cross_entropy import CHUNK_ROWS, linear_cross_entropy, token_losses

V, C = 64, 16
SIZES = [1, CHUNK_ROWS - 1, CHUNK_ROWS, CHUNK_ROWS + 1, 2 * CHUNK_ROWS + 77]


def random_arguments(n, bias, scale=1.0):
    """x [N, C], weight [V, C], bias [V] or None, y [N]."""
    g = torch.Generator().manual_seed(n)
    x, weight = scale * torch.randn(n, C, generator=g), torch.randn(V, C, generator=g)
    y = torch.randint(V, (n,), generator=g)
    return x, weight, torch.randn(V, generator=g) if bias else None, y


def exact_losses(x, weight, bias, y):
    """The losses [N] by PyTorch in float64, from all logits at once."""
    bias = None if bias is None else bias.double()
    logits = F.linear(x.double(), weight.double(), bias)
    return F.cross_entropy(logits, y, reduction="none")


class LargestTensor(TorchDispatchMode):
    """Records the number of elements of the largest tensor that an operator returns."""

    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor):
            self.numel = max(self.numel, result.numel())
        return result


@pytest.mark.parametrize("bias", [False, True], ids=["plain", "bias"])
@pytest.mark.parametrize("n", SIZES)
def test_loss_and_gradients_agree_with_pytorch(n, bias):
    x, weight, bias, y = random_arguments(n, bias)
    x.requires_grad_(), weight.requires_grad_()
    expected = exact_losses(x, weight, bias, y).mean()
    expected_gradients = torch.autograd.grad(expected, [x, weight])
    loss = linear_cross_entropy(x, weight, bias, y)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
    for found, exact in zip(
        torch.autograd.grad(loss, [x, weight]), expected_gradients, strict=True
    ):
        torch.testing.assert_close(found, exact, rtol=1e-4, atol=1e-5 / n)


def test_gradients_are_exact_in_float64():
    x, weight, bias, y = random_arguments(2 * CHUNK_ROWS + 77, bias=True)
    x, weight = x.double().requires_grad_(), weight.double().requires_grad_()
    expected = torch.autograd.grad(exact_losses(x, weight, bias, y).mean(), [x, weight])
    loss = linear_cross_entropy(x, weight, bias.double(), y)
    for found, exact in zip(torch.autograd.grad(loss, [x, weight]), expected, strict=True):
        torch.testing.assert_close(found, exact, rtol=1e-9, atol=1e-15)


@pytest.mark.parametrize("scale", [3.0, torch.tensor(3.0)])
def test_gradient_is_multiplied_by_scale(scale):
    x, weight, bias, y = random_arguments(300, bias=True)
    x.requires_grad_(), weight.requires_grad_()
    losses = [linear_cross_entropy(x, weight, bias, y, s) for s in (1.0, scale)]
    assert losses[0] == losses[1]
    plain, scaled = (torch.autograd.grad(loss, [x, weight]) for loss in losses)
    for gradient, scaled_gradient in zip(plain, scaled, strict=True):
        torch.testing.assert_close(scaled_gradient, 3 * gradient)


@pytest.mark.parametrize("bias", [False, True], ids=["plain", "bias"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_agrees_with_pytorch_up_to_rounding(dtype, bias):
    x, weight, bias, y = random_arguments(300, bias)
    x, weight = (t.to(dtype).requires_grad_() for t in (x, weight))
    expected = exact_losses(x, weight, bias, y).mean()
    loss = linear_cross_entropy(x, weight, bias, y)
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(expected.item(), rel=1e-2)
    gradients = (torch.autograd.grad(found, [x, weight]) for found in (loss, expected))
    for found, exact in zip(*gradients, strict=True):
        assert found.dtype == dtype
        assert (found.float() - exact.float()).norm() < 0.02 * exact.float().norm()


@pytest.mark.parametrize("bias", [False, True], ids=["plain", "bias"])
@pytest.mark.parametrize("n", SIZES)
def test_token_losses_agree_with_pytorch(n, bias):
    arguments = random_arguments(n, bias)
    found = token_losses(*arguments)
    assert found.shape == (n,)
    exact = exact_losses(*arguments)
    torch.testing.assert_close(found, exact, rtol=1e-5, atol=2e-6, check_dtype=False)


def test_logits_in_the_thousands_do_not_overflow():
    x, weight, bias, y = random_arguments(300, bias=True, scale=1_000.0)
    x.requires_grad_()
    exact = exact_losses(x, weight, bias, y).detach()
    found = token_losses(x, weight, bias, y)
    torch.testing.assert_close(found, exact, rtol=1e-4, atol=1e-2, check_dtype=False)
    loss = linear_cross_entropy(x, weight, bias, y)
    loss.backward()
    assert loss.item() == pytest.approx(exact.mean().item(), rel=1e-4)
    assert x.grad.isfinite().all()


@pytest.mark.parametrize("shift", [-500.0, -60.0, 60.0, 500.0])
def test_shift_of_all_logits_changes_nothing(shift):
    x, weight, bias, y = random_arguments(300, bias=True)
    x.requires_grad_(), weight.requires_grad_()
    losses = [linear_cross_entropy(x, weight, b, y) for b in (bias, bias + shift)]
    assert losses[1].item() == pytest.approx(losses[0].item(), rel=1e-5)
    gradients = (torch.autograd.grad(loss, [x, weight]) for loss in losses)
    for plain, shifted in zip(*gradients, strict=True):
        torch.testing.assert_close(shifted, plain, rtol=1e-3, atol=1e-6)


def test_logits_of_all_rows_are_never_in_memory():
    x, weight, bias, y = random_arguments(20 * CHUNK_ROWS, bias=True)
    x.requires_grad_(), weight.requires_grad_()
    with LargestTensor() as loss:
        linear_cross_entropy(x, weight, bias, y).backward()
    with LargestTensor() as losses:
        token_losses(x, weight, bias, y)
    assert loss.numel == len(x) * C  # the gradient of x, a quarter of all logits
    assert losses.numel == V * CHUNK_ROWS


@pytest.mark.parametrize("bias", [False, True], ids=["plain", "bias"])
@pytest.mark.parametrize("soft_share", [0.0, 0.4])
def test_mixed_targets_agree_with_pytorch(bias, soft_share):
    n, padding, last_share, factor = 40, 7, 0.1, torch.tensor(0.5)
    x, weight, bias, y = random_arguments(n, bias)
    y[0] = V - 1
    logits, soft = x @ weight.T, torch.randn(n, V).softmax(1)
    exact = logits.double().requires_grad_()
    targets = (1 - soft_share - last_share) * F.one_hot(y, V) + soft_share * soft.double()
    targets[:, -1] += last_share
    scores = exact if bias is None else exact + bias
    expected = scores.logsumexp(1) - (targets * exact).sum(1)
    expected.sum().backward()
    found = F.pad(logits, (0, padding))
    losses = cross_entropy_kernel.mixed_cross_entropy_(
        found, V, bias, y, factor, soft if soft_share else None, soft_share, last_share
    )
    torch.testing.assert_close(losses, expected.float().detach())
    torch.testing.assert_close(found[:, :V], 0.5 * exact.grad.float(), rtol=1e-4, atol=1e-6)
    assert not found[:, V:].any()
