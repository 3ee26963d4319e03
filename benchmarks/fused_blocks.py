"""The time of GPT's blocks on a GPU: fused passes, torch.compile's, and each fused kernel.

    python -m benchmarks.fused_blocks [small] [large]

small is 6/6/384 with B=8, T=128, large 12/12/768 with B=64, T=1024, both in bf16. Everything is
captured in CUDA graphs; prints medians. The speed of a kernel is that of the
memory that it must read and write at least, or of its arithmetic.
"""

import argparse
import gc
from collections.abc import Callable
from functools import partial
from statistics import median
from typing import Any

import torch
from torch.nn import functional as F

from folio import device
from folio.errors import UserError, one_line_errors
from folio.gpt.fused import attention, column_sums, gelu, gelu_products, layer_norm
from folio.gpt.fused.blocks import FusedBlocks
from folio.gpt.fused.gelu_products import Tile
from folio.gpt.fused.side_stream import SideStream
from folio.gpt.model import GPT, ModelParams

SIZES = {"small": (6, 6, 384, 8, 128), "large": (12, 12, 768, 64, 1024)}  # n_layer to T
REPEATS = {"small": 50, "large": 5}  # of a kernel in a graph
TILES = {
    "small": [
        gelu_products.SMALL,
        *(Tile(128, 64, 64, 4, 3, 4096, False), Tile(64, 64, 64, 4, 4, 4096, False)),
        *(Tile(64, 128, 128, 4, 2, 4096, False), Tile(128, 128, 64, 8, 3, 4096, False)),
    ],
    "large": [
        gelu_products.LARGE,
        *(Tile(128, 128, 64, 8, 2, 264, True), Tile(128, 128, 64, 4, 2, 264, True)),
        *(Tile(128, 128, 64, 8, 3, 132, False), Tile(256, 128, 64, 8, 3, 132, True)),
    ],
}
ROUNDS, REPLAYS = 9, 5
OPTIONS: dict[str, Any] = {"device": "cuda", "dtype": torch.bfloat16}
Work = Callable[[], object]


def measure(works: dict[str, Work], repeats: int) -> dict[str, float]:
    """The median time of each work in microseconds, of graphs with so many repeats each."""
    nothing = torch.empty(0, device="cuda")

    def repeated(work: Work) -> Callable[..., None]:
        def run(_: torch.Tensor) -> None:
            for _repeat in range(repeats):
                work()

        return device.capture(run, nothing)

    graphs = {name: repeated(work) for name, work in works.items()}
    taken: dict[str, list[float]] = {name: [] for name in works}
    for _ in range(ROUNDS):
        for name, replay in graphs.items():
            first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            for event in (first, last):  # while the first replays run, the others are launched
                for _replay in range(REPLAYS):
                    replay(nothing)
                event.record()
            last.synchronize()
            taken[name].append(1e3 * first.elapsed_time(last) / repeats / REPLAYS)
    return {name: median(times) for name, times in taken.items()}


def passes(size: str, way: str) -> Work:
    """A forward and a backward pass of the blocks."""
    n_layer, n_head, C, B, T = SIZES[size]
    params = ModelParams(n_layer=n_layer, n_head=n_head, n_embd=C, block_size=T, dropout=0.0)
    model: Any = GPT(params, 64).to("cuda", torch.bfloat16)
    x, d = torch.randn(2, B, T, C, device="cuda", dtype=torch.bfloat16)
    model.gradient_checkpointing = way == "fused, checkpointing"
    if way == "torch.compile":
        model.compile(fullgraph=True, dynamic=False)

        def run() -> None:
            model.zero_grad(set_to_none=True)
            model._compiled_blocks(x.clone().requires_grad_()).backward(d)

        return run
    fused = FusedBlocks(model)
    fused.FUSE_GELU = way == "fused, GELU in products"
    if way == "fused, one stream":
        fused._side = SideStream(torch.device("cpu"))
    return lambda: (fused.forward(x), fused.backward(d))


def print_passes(size: str) -> None:
    ways = ["torch.compile", "fused", "fused, one stream", "fused, GELU in products"]
    for way in [*ways, "fused, checkpointing"]:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        microseconds = measure({way: passes(size, way)}, 1)[way]
        peak = torch.cuda.max_memory_allocated() / 1e9
        print(f"{way:40} {microseconds:10,.0f} µs, {peak:.1f} GB", flush=True)
        gc.collect()


def kernels(size: str) -> dict[str, tuple[Work, float]]:
    """Kernels at memory speed by name, with the bytes that each must read and write."""
    _, n_head, C, B, T = SIZES[size]
    N, options = B * T, OPTIONS
    x, y = torch.randn(2, N, C, **options)
    wide, gradient = torch.randn(2, N, 4 * C, **options)
    qkv = torch.randn(B, T, 3 * C, **options)
    weight, bias = torch.randn(2, C, **options)
    seed = torch.tensor([1], device="cuda")
    partials = torch.empty(column_sums.partial_count(N), 13 * C, device="cuda")
    sums = torch.empty(13 * C, **options)
    norm = layer_norm.add_norm(x, y, weight, bias)
    out, logsumexp = attention.attend(qkv, n_head, 0.0, None)
    saved = (qkv, out, logsumexp, n_head, 0.0, None)
    part = 2 * N * C  # bytes
    back = (x, y, norm, weight, partials[:, : 3 * C])
    return {
        "add_norm": (lambda: layer_norm.add_norm(x, y, weight, bias), 4 * part),
        "add_norm, dropout": (lambda: layer_norm.add_norm(x, y, weight, bias, 0.1, seed), 4 * part),
        "add_norm_backward": (lambda: layer_norm.add_norm_backward(*back), 4 * part),
        "add_norm_backward, dropout": (
            lambda: layer_norm.add_norm_backward(*back, 0.1, seed),
            5 * part,
        ),
        "gelu": (lambda: gelu.gelu(wide), 8 * part),
        "gelu_backward_": (
            lambda: gelu.gelu_backward_(gradient, wide, partials[:, : 4 * C]),
            12 * part,
        ),
        "column_sums": (lambda: column_sums.column_sums(qkv.view(N, -1), partials), 3 * part),
        "add_partials": (lambda: column_sums.add_partials(partials, sums), 4 * partials.numel()),
        "attend": (lambda: attention.attend(qkv, n_head, 0.0, None), 4 * part),
        "attend_backward": (lambda: attention.attend_backward(out, *saved), 8 * part),
    }


def products(size: str) -> dict[str, Work]:
    """The two products with GELU, by cuBLAS with a kernel for GELU, and by Triton."""
    _, _, C, B, T = SIZES[size]
    N, options = B * T, OPTIONS
    x, d = torch.randn(2, N, C, **options)
    weight, transposed = torch.randn(4 * C, C, **options), torch.randn(C, 4 * C, **options)
    bias, wide = torch.randn(4 * C, **options), torch.randn(N, 4 * C, **options)
    partials = torch.empty(column_sums.partial_count(N), 4 * C, device="cuda")
    works: dict[str, Work] = {
        "c_fc, cuBLAS": lambda: F.linear(x, weight, bias),
        "c_fc, cuBLAS and gelu": lambda: gelu.gelu(F.linear(x, weight, bias)),
        "gradient, cuBLAS": lambda: d @ transposed,
        "gradient, cuBLAS and gelu_backward_": lambda: gelu.gelu_backward_(
            d @ transposed, wide, partials
        ),
    }
    for tile in TILES[size]:
        name = f"{tile.m}x{tile.n}x{tile.k} {tile.warps} {tile.stages} {tile.programs}"
        name += " halves" if tile.halves else ""
        works[f"c_fc, {name}"] = partial(gelu_products.linear_gelu, x, weight, bias, tile)
        arguments = (d, transposed, wide, tile)
        works[f"gradient, {name}"] = partial(gelu_products.gelu_linear_backward, *arguments)
    return works


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("sizes", nargs="*", help="small, large; by default both")
    sizes = parser.parse_args().sizes or list(SIZES)
    if unknown := [size for size in sizes if size not in SIZES]:
        raise UserError(f"{unknown[0]}: the sizes are small and large")
    if not torch.cuda.is_available():
        raise UserError("this measures a GPU, and PyTorch found none on this machine")
    with device.deterministic(True):
        for size in sizes:
            print(f"{size}, on {torch.cuda.get_device_name()}")
            print_passes(size)
            works = kernels(size)
            times = measure({name: work for name, (work, _) in works.items()}, REPEATS[size])
            for name, (_, size_in_bytes) in works.items():
                speed = size_in_bytes / times[name] / 1e6
                print(f"{name:40} {times[name]:10,.1f} µs {speed:6.2f} TB/s")
            _, _, C, B, T = SIZES[size]
            for name, microseconds in measure(products(size), REPEATS[size]).items():
                speed = 2 * B * T * C * 4 * C / microseconds / 1e6
                print(f"{name:40} {microseconds:10,.1f} µs {speed:6.0f} TFLOP/s", flush=True)


if __name__ == "__main__":
    with one_line_errors():
        main()
