"""The time of causal self-attention on a GPU, forward and backward, by implementation.

    python -m benchmarks.attention --batch 64 --context 1024 --heads 12 --size 64
    python -m benchmarks.attention --batch 8 --context 128 --heads 6 --dropout 0.1 --tune

Times are medians of a CUDA graph with several calls, so they are those of the GPU alone. The
backward time includes writing the gradients of q, k and v into one tensor. FLOPs are those of 2
matrix products in the forward and 5 in the backward pass, on and below the diagonal.
"""

import argparse
from collections.abc import Callable, Iterator
from functools import partial
from statistics import median

import torch
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from folio import device
from folio.errors import UserError, one_line_errors
from folio.gpt.fused import attention
from folio.gpt.fused.attention import Tile

CALLS, ROUNDS = 10, 15
# Rows kept, rows per iteration, warps, and the limit of registers.
FORWARD = [(32, 32, 4, None), (64, 32, 4, None), (64, 64, 4, None), (128, 32, 4, None)]
FORWARD += [(128, 64, 4, None), (128, 64, 8, None), (128, 128, 8, None)]
BACKWARD = [(32, 32, 4, None), (64, 32, 4, None), (64, 64, 4, None), (64, 64, 4, 168)]
BACKWARD += [(64, 64, 8, None), (128, 32, 8, None), (128, 32, 8, 128), (128, 64, 8, None)]
PYTORCH = {
    "PyTorch, flash": (SDPBackend.FLASH_ATTENTION, False),
    "PyTorch, flash, deterministic": (SDPBackend.FLASH_ATTENTION, True),
    "PyTorch, cuDNN": (SDPBackend.CUDNN_ATTENTION, False),
}


class Inputs:
    """Random tensors of one attention layer."""

    def __init__(self, options: argparse.Namespace):
        B, T, C = options.batch, options.context, options.heads * options.size
        self.heads, self.dropout = options.heads, options.dropout
        dtype = device.DTYPES[options.precision]
        self.qkv = torch.randn(B, T, 3 * C, device="cuda", dtype=dtype, requires_grad=True)
        self.d_out = torch.randn(B, T, C, device="cuda", dtype=dtype)
        self.seed = torch.tensor([1], device="cuda") if self.dropout else None
        self.flops = 2 * B * T * T * C  # of a forward pass

    def ours(
        self, forward_tile: Tile | None = None, backward_tile: Tile | None = None
    ) -> tuple[Callable, Callable]:
        """Functions that compute the output, and the gradient."""
        qkv = self.qkv.detach()
        options = (self.heads, self.dropout, self.seed)
        forward = partial(attention.attend, qkv, *options, forward_tile)
        saved = (self.d_out, qkv, *forward())
        return forward, partial(attention.attend_backward, *saved, *options, backward_tile)

    def pytorch(self) -> tuple[Callable, Callable]:
        B, T, _ = self.qkv.shape

        def forward() -> torch.Tensor:
            q, k, v = self.qkv.view(B, T, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
            x = F.scaled_dot_product_attention(q, k, v, dropout_p=self.dropout, is_causal=True)
            return x.transpose(1, 2).reshape(B, T, -1)

        out = forward()
        return forward, lambda: torch.autograd.grad(out, self.qkv, self.d_out, True)[0]


def milliseconds(work: Callable[[], object]) -> float:
    """The median GPU time of a call. Must run in a stream of its own."""
    graph = torch.cuda.CUDAGraph()
    work()
    torch.cuda.synchronize()
    stream = torch.cuda.current_stream()
    with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
        for _ in range(CALLS):
            work()
    graph.replay()
    times = []
    for _ in range(ROUNDS):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end) / CALLS)
    return median(times)


def compare(inputs: Inputs) -> None:
    print("implementation                   forward   TFLOP/s  backward   TFLOP/s      both")
    contenders: dict[str, Callable[[], tuple[float, float]]] = {}
    for name, (backend, exact) in PYTORCH.items():
        contenders[name] = partial(time_pytorch, inputs, backend, exact)
    contenders["ours"] = lambda: time_both(*inputs.ours())
    for name, measure in contenders.items():
        try:
            forward, backward = measure()
        except RuntimeError as error:  # the library has no kernel for these sizes
            print(f"{name:<30} {str(error).splitlines()[0][:90]}")
            continue
        speeds = [inputs.flops / forward / 1e9, 2.5 * inputs.flops / backward / 1e9]
        print(
            f"{name:<30}{forward:10.4f}{speeds[0]:10.0f}{backward:10.4f}{speeds[1]:10.0f}"
            f"{forward + backward:10.4f}",
            flush=True,
        )


def time_pytorch(inputs: Inputs, backend: SDPBackend, exact: bool) -> tuple[float, float]:
    with sdpa_kernel(backend), device.deterministic(exact):
        return time_both(*inputs.pytorch())


def time_both(forward: Callable, backward: Callable) -> tuple[float, float]:
    return milliseconds(forward), milliseconds(backward)


def tiles(way: str) -> Iterator[Tile]:
    """The tiles to try: those whose loops keep everything in registers at 64 channels a head."""
    for stages in (2, 3):
        for outer, inner, warps, registers in FORWARD if way == "forward" else BACKWARD:
            yield Tile(outer, inner, warps, stages, registers)


def tune(inputs: Inputs) -> None:
    """Print the time of each tile, and by how much its results differ from PyTorch's.

    With dropout, whose masks differ, from those of our own default tile.
    """
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        works = inputs.ours() if inputs.dropout else inputs.pytorch()
        expected = [first(work()) for work in works]
    tune_tiles(inputs, 0, "forward", expected[0])
    tune_tiles(inputs, 1, "backward", expected[1])


def tune_tiles(inputs: Inputs, index: int, way: str, expected: torch.Tensor) -> None:
    from triton.runtime.errors import OutOfResources

    print(f"\n{way:8}  outer  inner  warps  stages  registers        ms   TFLOP/s     error")
    flops, times = inputs.flops * (2.5 if index else 1.0), {}
    for tile in tiles(way):
        line = f"{tile.outer:15}{tile.inner:7}{tile.warps:7}{tile.stages:8}"
        line += f"{tile.registers or '':>11}"
        choice = (None, tile) if index else (tile, None)
        try:
            work = inputs.ours(*choice)[index]
            times[tile] = ms = milliseconds(work)
        except OutOfResources as problem:
            print(f"{line}  {str(problem).splitlines()[0]}", flush=True)
            continue
        error = ((first(work()) - expected).abs().max() / expected.abs().max()).item()
        print(f"{line}{ms:10.4f}{flops / ms / 1e9:10.0f}{error:10.1e}", flush=True)
    print(f"fastest: {min(times, key=lambda tile: times[tile])}")


def first(result: torch.Tensor | tuple[torch.Tensor, ...]) -> torch.Tensor:
    return result[0] if isinstance(result, tuple) else result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--context", type=int, default=1024)
    parser.add_argument("--heads", type=int, default=12)
    parser.add_argument("--size", type=int, default=64, help="channels per head")
    parser.add_argument("--dropout", type=float, default=0.0)
    parser.add_argument("--precision", choices=("bf16", "fp16"), default="bf16")
    parser.add_argument("--tune", action="store_true", help="also try other tiles")
    options = parser.parse_args()
    if min(options.batch, options.context, options.heads) < 1 or not 0 <= options.dropout < 1:
        parser.error("--batch, --context and --heads must be at least 1, and 0 <= --dropout < 1")
    if not torch.cuda.is_available():
        raise UserError("this measures GPU kernels, and PyTorch found no GPU on this machine")
    if not attention.supports(options.heads * options.size, options.heads):
        raise UserError(f"--size {options.size}: it must be 16, 32, 64 or 128, and needs Triton")
    print(
        f"B={options.batch} T={options.context} heads={options.heads} D={options.size}"
        f" dropout={options.dropout} {options.precision} on {torch.cuda.get_device_name()}; ms"
    )
    with torch.cuda.stream(torch.cuda.Stream()):
        inputs = Inputs(options)
        compare(inputs)
        if options.tune:
            tune(inputs)


if __name__ == "__main__":
    with one_line_errors():
        main()
