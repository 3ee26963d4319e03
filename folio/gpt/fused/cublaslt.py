"""Matrix products of cuBLASLt that also compute GELU, its gradient or column sums.

PyTorch has no operators for these epilogues (cuBLAS documentation, cublasLtEpilogue_t), so the
library that it has loaded is called through ctypes. Enumerations and structures are those of
cublasLt.h, which are the same in CUDA 12 and 13.

All matrices here are row-major. cuBLAS's are column-major, so it computes the transposed product:
its A is b, its B is a, and a row of `out` is a column of its D.
"""

import ctypes
import functools
from dataclasses import dataclass
from enum import IntEnum

import torch

_WORKSPACE = 32 << 20  # bytes, as much as PyTorch gives cuBLAS on Hopper GPUs
_CANDIDATES, _REPEATS = 8, 5  # algorithms to compare, and how often to run each
_TYPES = {torch.float32: 0, torch.float16: 2, torch.bfloat16: 14}  # cudaDataType
_COMPUTE_32F = 68  # cublasComputeType_t
# cublasLtMatmulDescAttributes_t and cublasLtMatmulPreferenceAttributes_t
_TRANSA, _TRANSB, _EPILOGUE, _VECTOR, _MATRIX, _MATRIX_WIDTH = 3, 4, 7, 8, 11, 12
_MAX_WORKSPACE, _MIN_ALIGNMENTS = 1, (5, 6, 7, 8)
_ALIGNMENT = 256  # bytes, of a tensor in memory; more makes no difference


class Epilogue(IntEnum):
    """What a product also does with `vector` and `matrix`."""

    NONE = 1
    BIAS = 4  # adds vector [N] to each row
    GELU = 32 | 128 | 4  # adds vector, writes the sum to matrix [M, N], and its GELU to out
    GELU_BACKWARD = 64 | 128  # out is the gradient of GELU's result; multiplies by slope at matrix
    # ... and writes the sums of the columns of out to vector [N]:
    GELU_BACKWARD_SUMS = 64 | 128 | 16
    ROW_SUMS = 512  # writes the sums of the rows of a to vector [M]


class _HeuristicResult(ctypes.Structure):
    """cublasLtMatmulHeuristicResult_t."""

    _fields_ = (
        ("algorithm", ctypes.c_uint64 * 8),
        ("workspace", ctypes.c_size_t),
        ("state", ctypes.c_int),
        ("waves", ctypes.c_float),
        ("reserved", ctypes.c_int * 4),
    )


def matmul(
    a: torch.Tensor,
    b: torch.Tensor,
    out: torch.Tensor,
    epilogue: Epilogue = Epilogue.NONE,
    vector: torch.Tensor | None = None,
    matrix: torch.Tensor | None = None,
) -> None:
    """Write a [M, K] times b [K, N] to out [M, N], on the current CUDA stream.

    All tensors are of one precision on one GPU. a and b are contiguous or transposed, out, vector
    and matrix contiguous. GELU is that with tanh. With deterministic algorithms (see
    torch.use_deterministic_algorithms), the algorithm is the one that cuBLAS recommends; otherwise
    the first call for sizes that are new compares some. Raises RuntimeError if cuBLAS refuses.
    """
    assert a.dtype == b.dtype == out.dtype and out.is_contiguous()
    fixed = torch.are_deterministic_algorithms_enabled()
    operands = tuple(_Operand.of(t) for t in (b, a, out))
    plan = _plan(operands, epilogue, out.dtype, out.device.index, fixed)
    plan.run((b, a, out), vector, matrix)


@dataclass(frozen=True)
class _Operand:
    """A matrix in memory: rows of `width` elements, which may be the columns of the operand."""

    rows: int
    width: int
    transposed: bool
    alignment: int  # bytes

    @classmethod
    def of(cls, t: torch.Tensor) -> "_Operand":
        transposed = not t.is_contiguous()
        rows, width = t.T.shape if transposed else t.shape
        assert t.T.is_contiguous() or not transposed
        return cls(rows, width, transposed, min(_ALIGNMENT, t.data_ptr() & -t.data_ptr()))


class _Plan:
    """A product of matrices of fixed sizes, and the algorithm for it."""

    def __init__(
        self,
        operands: tuple[_Operand, ...],
        epilogue: Epilogue,
        dtype: torch.dtype,
        device: int,
        fixed: bool,
    ):
        self.operands, self.epilogue, self.device, self.fixed = operands, epilogue, device, fixed
        self._description = _create("MatmulDesc", _COMPUTE_32F, _TYPES[torch.float32])
        for attribute, operand in zip((_TRANSA, _TRANSB), operands, strict=False):
            self._set(attribute, ctypes.c_int32(operand.transposed))
        self._set(_EPILOGUE, ctypes.c_uint32(epilogue))
        self._set(_MATRIX_WIDTH, ctypes.c_int64(operands[2].width))
        self._layouts = [
            _create(
                "MatrixLayout",
                _TYPES[dtype],
                *(ctypes.c_uint64(operand.width), ctypes.c_uint64(operand.rows)),
                ctypes.c_int64(operand.width),
            )
            for operand in operands
        ]
        self._algorithm: _HeuristicResult | None = None

    def run(
        self,
        tensors: tuple[torch.Tensor, ...],
        vector: torch.Tensor | None,
        matrix: torch.Tensor | None,
    ) -> None:
        for attribute, tensor in ((_VECTOR, vector), (_MATRIX, matrix)):
            assert tensor is None or tensor.is_contiguous()
            address = 0 if tensor is None else tensor.data_ptr()
            self._set(attribute, ctypes.c_void_p(address))
        if self._algorithm is None:
            self._algorithm = self._choose(tensors)
        self._launch(tensors, self._algorithm)

    def _launch(self, tensors: tuple[torch.Tensor, ...], found: _HeuristicResult) -> None:
        workspace = torch.empty(_WORKSPACE, dtype=torch.uint8, device=tensors[2].device)
        (a, b, d), (la, lb, ld) = (ctypes.c_void_p(t.data_ptr()) for t in tensors), self._layouts
        one, zero = ctypes.byref(ctypes.c_float(1)), ctypes.byref(ctypes.c_float(0))
        _call(
            "Matmul",
            *(_handle(self.device), self._description, one, a, la, b, lb, zero, d, ld, d, ld),
            *(ctypes.byref(found.algorithm), ctypes.c_void_p(workspace.data_ptr())),
            *(ctypes.c_size_t(_WORKSPACE), _stream()),
        )

    def _choose(self, tensors: tuple[torch.Tensor, ...]) -> _HeuristicResult:
        """The algorithm that cuBLAS recommends, or the fastest one of several."""
        found = self._recommended(1 if self.fixed else _CANDIDATES)
        if len(found) == 1 or torch.cuda.is_current_stream_capturing():
            return found[0]
        torch.cuda.synchronize(self.device)
        return min(found, key=lambda each: self._time(tensors, each))

    def _recommended(self, count: int) -> list[_HeuristicResult]:
        preference = _create("MatmulPreference")
        a, b, d = (operand.alignment for operand in self.operands)
        values: list[tuple[int, ctypes._SimpleCData]]
        values = [(_MAX_WORKSPACE, ctypes.c_uint64(_WORKSPACE))]
        values += [
            (attribute, ctypes.c_uint32(alignment))
            for attribute, alignment in zip(_MIN_ALIGNMENTS, (a, b, d, d), strict=True)
        ]
        for attribute, value in values:
            size = ctypes.c_size_t(ctypes.sizeof(value))
            _call("MatmulPreferenceSetAttribute", preference, attribute, ctypes.byref(value), size)
        results, returned = (_HeuristicResult * count)(), ctypes.c_int()
        layouts = (*self._layouts, self._layouts[2])
        _call(
            "MatmulAlgoGetHeuristic",
            *(_handle(self.device), self._description, *layouts, preference, count),
            *(results, ctypes.byref(returned)),
        )
        _call("MatmulPreferenceDestroy", preference)
        found = [each for each in results[: returned.value] if each.state == 0]
        if not found:
            raise RuntimeError(f"cuBLASLt has no algorithm for {self.epilogue!r}, {self.operands}")
        return found

    def _time(self, tensors: tuple[torch.Tensor, ...], found: _HeuristicResult) -> float:
        """The time of a call on the GPU, in ms."""
        self._launch(tensors, found)
        first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        first.record()
        for _ in range(_REPEATS):
            self._launch(tensors, found)
        last.record()
        last.synchronize()
        return first.elapsed_time(last) / _REPEATS

    def _set(self, attribute: int, value: "ctypes._SimpleCData") -> None:
        size = ctypes.c_size_t(ctypes.sizeof(value))
        _call("MatmulDescSetAttribute", self._description, attribute, ctypes.byref(value), size)


@functools.cache
def _plan(*key: object) -> _Plan:
    return _Plan(*key)  # type: ignore[arg-type]


@functools.cache
def _library() -> ctypes.CDLL:
    assert torch.version.cuda
    return ctypes.CDLL(f"libcublasLt.so.{torch.version.cuda.split('.')[0]}")


@functools.cache
def _handle(device: int) -> ctypes.c_void_p:
    with torch.cuda.device(device):
        return _create("")


def _create(kind: str, *arguments: object) -> ctypes.c_void_p:
    created = ctypes.c_void_p()
    _call(f"{kind}Create", ctypes.byref(created), *arguments)
    return created


def _stream() -> ctypes.c_void_p:
    return ctypes.c_void_p(torch.cuda.current_stream().cuda_stream)


def _call(name: str, *arguments: object) -> None:
    if status := getattr(_library(), f"cublasLt{name}")(*arguments):
        raise RuntimeError(f"cublasLt{name} returned status {status}")
