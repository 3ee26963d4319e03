"""The head's cross-entropy by rows is PyTorch's."""

import pytest
import torch
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from folio.gpt import cross_entropy

V, C = 64, 16
SIZES = [
    1,
    cross_entropy.ROWS - 1,
    cross_entropy.ROWS,
    cross_entropy.ROWS + 1,
    2 * cross_entropy.ROWS + 77,
]


def numbers(n, bias, scale=1.0):
    """x [N, C], weight [V, C], bias [V] or None, y [N]."""
    g = torch.Generator().manual_seed(n)
    x, weight = scale * torch.randn(n, C, generator=g), torch.randn(V, C, generator=g)
    y = torch.randint(V, (n,), generator=g)
    return x, weight, torch.randn(V, generator=g) if bias else None, y


def exact_losses(x, weight, bias, y):
    """PyTorch's own, [N] in float64, from all the logits."""
    bias = None if bias is None else bias.double()
    logits = F.linear(x.double(), weight.double(), bias)
    return F.cross_entropy(logits, y, reduction="none")


class Largest(TorchDispatchMode):
    """Watches how many numbers the largest new tensor holds."""

    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor):
            self.numel = max(self.numel, result.numel())
        return result


@pytest.mark.parametrize("bias", [False, True], ids=["plain", "bias"])
@pytest.mark.parametrize("n", SIZES)
def test_loss_and_gradients_are_those_of_cross_entropy(n, bias):
    x, weight, bias, y = numbers(n, bias)
    x.requires_grad_(), weight.requires_grad_()
    expected = exact_losses(x, weight, bias, y).mean()
    expected_gradients = torch.autograd.grad(expected, [x, weight])
    loss = cross_entropy.linear_cross_entropy(x, weight, bias, y)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
    for found, exact in zip(
        torch.autograd.grad(loss, [x, weight]), expected_gradients, strict=True
    ):
        torch.testing.assert_close(found, exact, rtol=1e-4, atol=1e-5 / n)


def test_in_float64_the_gradients_are_exact():
    x, weight, bias, y = numbers(2 * cross_entropy.ROWS + 77, bias=True)
    x, weight = x.double().requires_grad_(), weight.double().requires_grad_()
    expected = torch.autograd.grad(exact_losses(x, weight, bias, y).mean(), [x, weight])
    loss = cross_entropy.linear_cross_entropy(x, weight, bias.double(), y)
    for found, exact in zip(torch.autograd.grad(loss, [x, weight]), expected, strict=True):
        torch.testing.assert_close(found, exact, rtol=1e-9, atol=1e-15)


@pytest.mark.parametrize("scale", [3.0, torch.tensor(3.0)])
def test_the_gradient_is_that_of_the_loss_times_scale(scale):
    x, weight, bias, y = numbers(300, bias=True)
    x.requires_grad_(), weight.requires_grad_()
    losses = [cross_entropy.linear_cross_entropy(x, weight, bias, y, s) for s in (1.0, scale)]
    assert losses[0] == losses[1]
    plain, scaled = (torch.autograd.grad(loss, [x, weight]) for loss in losses)
    for once, often in zip(plain, scaled, strict=True):
        torch.testing.assert_close(often, 3 * once)


@pytest.mark.parametrize("bias", [False, True], ids=["plain", "bias"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_in_half_precision_it_is_cross_entropy_but_for_rounding(dtype, bias):
    x, weight, bias, y = numbers(300, bias)
    x, weight = (t.to(dtype).requires_grad_() for t in (x, weight))
    expected = exact_losses(x, weight, bias, y).mean()
    loss = cross_entropy.linear_cross_entropy(x, weight, bias, y)
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(expected.item(), rel=1e-2)
    gradients = (torch.autograd.grad(found, [x, weight]) for found in (loss, expected))
    for found, exact in zip(*gradients, strict=True):
        assert found.dtype == dtype
        assert (found.float() - exact.float()).norm() < 0.02 * exact.float().norm()


@pytest.mark.parametrize("bias", [False, True], ids=["plain", "bias"])
@pytest.mark.parametrize("n", SIZES)
def test_token_losses_are_those_of_cross_entropy(n, bias):
    arguments = numbers(n, bias)
    found = cross_entropy.token_losses(*arguments)
    assert found.shape == (n,)
    torch.testing.assert_close(
        found, exact_losses(*arguments), rtol=1e-5, atol=2e-6, check_dtype=False
    )


def test_logits_in_the_thousands_do_not_overflow():
    x, weight, bias, y = numbers(300, bias=True, scale=1_000.0)
    x.requires_grad_()
    exact = exact_losses(x, weight, bias, y).detach()
    torch.testing.assert_close(
        cross_entropy.token_losses(x, weight, bias, y),
        exact,
        rtol=1e-4,
        atol=1e-2,
        check_dtype=False,
    )
    loss = cross_entropy.linear_cross_entropy(x, weight, bias, y)
    loss.backward()
    assert loss.item() == pytest.approx(exact.mean().item(), rel=1e-4)
    assert x.grad.isfinite().all()


@pytest.mark.parametrize("shift", [-500.0, -60.0, 60.0, 500.0])
def test_what_is_added_to_all_logits_changes_nothing(shift):
    x, weight, bias, y = numbers(300, bias=True)
    x.requires_grad_(), weight.requires_grad_()
    losses = [cross_entropy.linear_cross_entropy(x, weight, b, y) for b in (bias, bias + shift)]
    assert losses[1].item() == pytest.approx(losses[0].item(), rel=1e-5)
    gradients = (torch.autograd.grad(loss, [x, weight]) for loss in losses)
    for plain, shifted in zip(*gradients, strict=True):
        torch.testing.assert_close(shifted, plain, rtol=1e-3, atol=1e-6)


def test_never_are_the_logits_of_all_rows_held():
    x, weight, bias, y = numbers(20 * cross_entropy.ROWS, bias=True)
    with Largest() as loss:
        cross_entropy.linear_cross_entropy(
            x.requires_grad_(), weight.requires_grad_(), bias, y
        ).backward()
    with Largest() as losses:
        cross_entropy.token_losses(x, weight, bias, y)
    assert loss.numel == len(x) * C  # the gradient of x, a quarter of the logits
    assert losses.numel == V * cross_entropy.ROWS
