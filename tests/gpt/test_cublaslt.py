"""cuBLASLt's products with epilogues agree with PyTorch's, and repeat their bits."""

import pytest
import torch
from torch.nn import functional as F

from folio import device
from folio.gpt.fused import cublaslt
from folio.gpt.fused.cublaslt import Epilogue

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
HALF = [torch.bfloat16, torch.float16]
M, K, N = 320, 192, 448


def matrices(dtype, transposed=(False, True), where="cuda"):
    g = torch.Generator().manual_seed(1)

    def new(rows, columns, transposed):
        t = torch.randn(*((columns, rows) if transposed else (rows, columns)), generator=g)
        t = t.to(where, dtype)
        return t.T if transposed else t

    a, b = (new(*sizes, t) for sizes, t in zip(((M, K), (K, N)), transposed, strict=True))
    return a, b / K**0.5, new(M, N, False), new(1, N, False)[0]


def run(a, b, epilogue, fixed=True, **tensors):
    out = torch.full((len(a), b.shape[1]), float("nan"), device=a.device, dtype=a.dtype)
    with device.deterministic(fixed):
        cublaslt.matmul(a, b, out, epilogue, **tensors)
    return out


def close(found, expected, dtype):
    tolerance = 2e-2 if dtype == torch.bfloat16 else 3e-3
    torch.testing.assert_close(found.float(), expected.float(), rtol=tolerance, atol=tolerance)


def test_cublaslt_describes_matrices_as_columns():
    x = torch.empty(3, 8)
    assert cublaslt._Operand.of(x).transposed is False
    assert (cublaslt._Operand.of(x).rows, cublaslt._Operand.of(x).width) == (3, 8)
    assert cublaslt._Operand.of(x.T).transposed is True
    assert (cublaslt._Operand.of(x.T).rows, cublaslt._Operand.of(x.T).width) == (3, 8)


@needs_gpu
@pytest.mark.parametrize("fixed", [True, False])
@pytest.mark.parametrize("transposed", [(False, False), (False, True), (True, False)])
@pytest.mark.parametrize("dtype", HALF)
def test_cublaslt_products_agree_with_pytorch(dtype, transposed, fixed):
    a, b, _, bias = matrices(dtype, transposed)
    exact = a.float() @ b.float()
    close(run(a, b, Epilogue.NONE, fixed), exact, dtype)
    close(run(a, b, Epilogue.BIAS, fixed, vector=bias), exact + bias.float(), dtype)


@needs_gpu
@pytest.mark.parametrize("fixed", [True, False])
@pytest.mark.parametrize("dtype", HALF)
def test_cublaslt_gelu_agrees_with_pytorch(dtype, fixed):
    a, b, matrix, bias = matrices(dtype)
    found = run(a, b, Epilogue.GELU, fixed, vector=bias, matrix=matrix)
    sums = a.float() @ b.float() + bias.float()
    close(matrix, sums, dtype)
    close(found, F.gelu(sums, approximate="tanh"), dtype)


@needs_gpu
@pytest.mark.parametrize("epilogue", [Epilogue.GELU_BACKWARD, Epilogue.GELU_BACKWARD_SUMS])
@pytest.mark.parametrize("dtype", HALF)
def test_cublaslt_gradient_of_gelu_agrees_with_autograd(dtype, epilogue):
    a, b, matrix, sums = matrices(dtype, (False, False))
    before = sums.clone()
    found = run(a, b, epilogue, vector=sums, matrix=matrix)
    x = matrix.float().requires_grad_()
    F.gelu(x, approximate="tanh").backward(a.float() @ b.float())
    close(found, x.grad, dtype)
    if epilogue == Epilogue.GELU_BACKWARD:
        assert torch.equal(sums, before)
    else:
        torch.testing.assert_close(sums.float(), x.grad.sum(0), rtol=2e-2, atol=0.1)


@needs_gpu
@pytest.mark.parametrize("dtype", HALF)
def test_cublaslt_sums_of_rows(dtype):
    a, b, *_ = matrices(dtype, (True, False))
    sums = a.new_empty(M)
    close(run(a, b, Epilogue.ROW_SUMS, vector=sums), a.float() @ b.float(), dtype)
    torch.testing.assert_close(sums.float(), a.float().sum(1), rtol=2e-2, atol=0.1)


@needs_gpu
@pytest.mark.parametrize("epilogue", list(Epilogue))
def test_cublaslt_repeats_its_bits_in_graphs_too(epilogue):
    transposed = (True, False) if epilogue == Epilogue.ROW_SUMS else (False, True)
    a, b, matrix, vector = matrices(torch.bfloat16, transposed)
    vector = a.new_ones(M) if epilogue == Epilogue.ROW_SUMS else vector
    out = torch.empty(M, N, device="cuda", dtype=torch.bfloat16)
    found = []
    with device.deterministic(True):
        work = device.capture(lambda a: cublaslt.matmul(a, b, out, epilogue, vector, matrix), a)
        for _ in range(3):
            work(a)
            found.append([t.clone() for t in (out, vector, matrix)])
        cublaslt.matmul(a, b, out, epilogue, vector, matrix)
        found.append([out, vector, matrix])
    for other in found[1:]:
        assert all(torch.equal(*pair) for pair in zip(found[0], other, strict=True))
