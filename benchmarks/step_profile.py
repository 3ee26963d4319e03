"""Where a training step spends its time, and two lower bounds for it on this machine.

    python -m benchmarks.step_profile [--variant seed-30m] [--batch 8] [--tie]
                                      [--compiled | --plain] [--kernels 20]

The lower bounds are the step's arithmetic at the speed of a large matrix product, and the memory
traffic of weights, gradients and AdamW's moments at the speed of a copy. Both speeds are measured
on the same machine.
"""

import argparse
import time
from collections import Counter
from collections.abc import Callable
from statistics import median

import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks.step import add_options, build_folio, read_options
from folio import device
from folio.errors import one_line_errors

STEPS = 10
OPERATORS = {  # on a CPU: a kind of operator, and the prefixes of its operators' names
    "matrix products": ("aten::mm", "aten::addmm", "aten::bmm", "aten::baddbmm"),
    "attention": ("aten::_scaled_dot_product", "aten::_flash", "aten::_efficient", "aten::_cudnn"),
    "the head's softmax": ("aten::exp", "aten::amax", "aten::sub", "aten::_log_softmax"),
    "GELU, layer norms": ("aten::gelu", "aten::native_layer_norm"),
    "AdamW, gradient norm": ("aten::_fused_adamw", "aten::linalg_vector_norm"),
    "fill, copy, add, scale, sum": (
        *("aten::fill", "aten::copy", "aten::add", "aten::mul", "aten::sum", "aten::zero"),
        *("aten::scatter", "aten::embedding", "aten::index", "aten::cat", "aten::div"),
    ),
}

KERNELS = {  # on a GPU: a kind of kernel, and parts of its kernels' names; the first match counts
    "attention": ("sdpa", "flash", "fmha", "compute_dot_do_o", "convert_dq", "attention_"),
    "matrix products": ("nvjet", "gemm", "cutlass", "splitK", "gemv"),
    "the head's softmax": ("_cross_entropy",),
    "AdamW, copies, norm": ("multi_tensor_apply", "_square_sums", "_check_and_scale", "_update"),
    "fused: GELU, norms, sums": ("_gelu", "_add_norm", "_column_sums", "_add_partials"),
    "fused: embeddings": ("_embed", "_drop_"),
    "compiled: GELU, norms, sums": ("triton_",),
    "GELU, layer norms, sums": ("Gelu", "layer_norm", "GammaBeta", "reduce_kernel"),
    "embedding, add, fill, cat": ("embedding", "elementwise", "Cat", "scatter", "gather", "grad_w"),
}


def measure(
    work: Callable[[], object], where: torch.device, calls: int = 1, rounds: int = 9
) -> float:
    """The median time of a call in seconds, if the host waits for the device after `calls` calls,
    as benchmarks/step.py does after those of a round."""
    wait = torch.cuda.synchronize if where.type == "cuda" else lambda: None
    taken = []
    for _ in range(rounds + 2):
        wait()
        started = time.perf_counter()
        for _ in range(calls):
            work()
        wait()
        taken.append((time.perf_counter() - started) / calls)
    return median(taken[2:])


def product_rate(where: torch.device, precision: str) -> float:
    """Operations per second in a large matrix product."""
    n = 8192 if where.type == "cuda" else 2048
    dtype = torch.float32 if precision == "fp32" else torch.bfloat16
    a, b = (torch.randn(n, n, device=where, dtype=dtype) for _ in range(2))
    return 2 * n**3 / measure(lambda: a @ b, where)


def copy_rate(where: torch.device) -> float:
    """Bytes per second, read or written, in a copy of 400 MB."""
    a, b = (torch.empty(100_000_000, device=where) for _ in range(2))
    return 2 * 4 * a.numel() / measure(lambda: b.copy_(a), where)


def profile_step(
    step: Callable[[], object], where: torch.device
) -> tuple[Counter[str], dict[str, tuple[float, float]]]:
    """ms/step by kind of operator, or on a GPU by kind of kernel; and calls and ms per step of each
    operator or kernel."""
    kind = ProfilerActivity.CUDA if where.type == "cuda" else ProfilerActivity.CPU
    with profile(activities=[kind]) as profiled:
        for _ in range(STEPS):
            step()
        if where.type == "cuda":
            torch.cuda.synchronize()
    found: Counter[str] = Counter()
    each: dict[str, tuple[float, float]] = {}
    for event in profiled.key_averages():
        taken = event.self_device_time_total if where.type == "cuda" else event.self_cpu_time_total
        if where.type == "cuda":
            is_kind = (
                k for k, parts in KERNELS.items() if any(part in event.key for part in parts)
            )
        else:
            is_kind = (k for k, starts in OPERATORS.items() if event.key.startswith(starts))
        found[next(is_kind, "other")] += taken / 1000 / STEPS
        each[event.key] = event.count / STEPS, taken / 1000 / STEPS
    return found, each


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_options(parser)
    parser.add_argument(
        "--tie", action="store_true", help="one embedding row for all unseen tokens"
    )
    passes = parser.add_mutually_exclusive_group()
    passes.add_argument("--compiled", action="store_true", help="torch.compile, not fused kernels")
    passes.add_argument("--plain", action="store_true", help="PyTorch's own kernels")
    parser.add_argument("--kernels", type=int, default=0, help="also show so many operators")
    options = parser.parse_args()
    if options.kernels < 0:
        parser.error(f"--kernels is {options.kernels}: it must be at least 0")
    work, title = read_options(options)
    fused = not (options.compiled or options.plain)
    step = build_folio(work, options.tie, compiled=options.compiled, fused=fused)
    steps = 20 if work.where.type == "cuda" else 1  # a CPU has done a step when the call returns
    whole = 1000 * measure(step, work.where, steps)
    print(f"{title}: {whole:.2f} ms/step")
    found, each = profile_step(step, work.where)
    for kind, ms in found.most_common():
        print(f"  {kind:<28}{ms:9.2f} ms{ms / found.total():7.1%}")
    slowest = sorted(each.items(), key=lambda item: -item[1][1])[: options.kernels]
    for name, (calls, ms_each) in slowest:
        print(f"  {ms_each:9.4f} ms, {calls:6.1f} calls: {name[:80]}")
    p, tokens = work.size, work.batch_size * work.size.block_size
    matrices = 12 * p.n_layer * p.n_embd**2 + work.rows(options.tie) * p.n_embd
    # the backward pass takes twice the forward pass; attention computes the causal half
    operations = 6 * matrices * tokens + 6 * p.n_layer * p.block_size * p.n_embd * tokens
    # In the step's precision, weights are read in both passes, and gradients written and read. In
    # fp32, weights and both moments are read and written.
    width = 4 if work.precision == "fp32" else 2
    moved = matrices * (4 * width + 4 * 6)
    products, copies = product_rate(work.where, work.precision), copy_rate(work.where)
    for name, bound, rate in (
        ("arithmetic", operations / products, f"{products / 1e12:.3g} TFLOP/s"),
        ("memory traffic", moved / copies, f"{copies / 1e9:.3g} GB/s"),
    ):
        print(f"  bound by {name:<19}{1000 * bound:9.2f} ms{1000 * bound / whole:7.1%}, at {rate}")
    print(f"on {device.describe(work.where)}, {work.precision}, PyTorch {torch.__version__}")


if __name__ == "__main__":
    with one_line_errors():
        main()
