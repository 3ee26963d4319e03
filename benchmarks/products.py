"""The time of GPT's matrix products on a GPU, by PyTorch and by cuBLASLt with its epilogues.

    python -m benchmarks.products [--batch 64] [--context 1024] [--width 768]

Prints the medians in µs of CUDA graphs: PyTorch's product; cuBLASLt's with the algorithm that it
recommends first, which steps that must repeat their bits use; and with the fastest of several
(deterministic: false). An epilogue replaces a kernel of its own, whose time is below.
"""

import argparse
from collections.abc import Callable
from functools import partial
from statistics import median

import torch

from folio import device
from folio.errors import UserError, one_line_errors
from folio.gpt.fused import column_sums, cublaslt, gelu
from folio.gpt.fused.cublaslt import Epilogue

CALLS, ROUNDS = 10, 9
Work = Callable[[], object]


def measure(work: Work) -> float:
    """The median time of a call in µs."""
    nothing = torch.empty(0, device="cuda")

    def run(_: torch.Tensor) -> None:
        for _call in range(CALLS):
            work()

    replay = device.capture(run, nothing)
    taken = []
    for _ in range(ROUNDS):
        first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        first.record()
        replay(nothing)
        last.record()
        last.synchronize()
        taken.append(1e3 * first.elapsed_time(last) / CALLS)
    return median(taken)


def products(tokens: int, width: int) -> dict[str, tuple[tuple[torch.Tensor, ...], list[Epilogue]]]:
    """a, b and out of each product by name, and the epilogues that it can have."""
    N, C = tokens, width
    new = partial(torch.randn, device="cuda", dtype=torch.bfloat16)
    x, wide, qkv = new(N, C), new(N, 4 * C), new(N, 3 * C)
    up, down, attn, proj = new(4 * C, C), new(C, 4 * C), new(3 * C, C), new(C, C)
    none, bias, sums = Epilogue.NONE, Epilogue.BIAS, Epilogue.ROW_SUMS
    backward = [none, Epilogue.GELU_BACKWARD, Epilogue.GELU_BACKWARD_SUMS]
    return {
        "c_attn": ((x, attn.T, qkv), [bias]),
        "attn.c_proj": ((x, proj.T, new(N, C)), [bias]),
        "c_fc": ((x, up.T, wide), [bias, Epilogue.GELU]),
        "mlp.c_proj": ((wide, down.T, new(N, C)), [bias]),
        "c_attn, gradient of x": ((qkv, attn, new(N, C)), [none]),
        "attn.c_proj, gradient of x": ((x, proj, new(N, C)), [none]),
        "c_fc, gradient of x": ((wide, up, new(N, C)), [none]),
        "mlp.c_proj, gradient of x": ((x, down, wide), backward),
        "c_attn, gradient of weight": ((qkv.T, x, attn), [none, sums]),
        "attn.c_proj, gradient of weight": ((x.T, x, proj), [none, sums]),
        "c_fc, gradient of weight": ((wide.T, x, up), [none, sums]),
        "mlp.c_proj, gradient of weight": ((x.T, wide, down), [none, sums]),
    }


def rows(tokens: int, width: int) -> None:
    """Print a row for each product and epilogue."""
    print(f"{'':50}{'PyTorch':>9}{'cuBLASLt':>9}{'fastest':>9}  TFLOP/s")
    for name, ((a, b, out), epilogues) in products(tokens, width).items():
        matrix = torch.randn_like(out)
        usual = partial(torch.mm, a, b, out=out)
        for epilogue in epilogues:
            length = len(out) if epilogue == Epilogue.ROW_SUMS else out.shape[1]
            vector = out.new_ones(length)
            if epilogue == Epilogue.BIAS:
                usual = partial(torch.addmm, vector, a, b, out=out)
            work = partial(cublaslt.matmul, a, b, out, epilogue, vector, matrix)
            times = [measure(usual)]
            for fixed in (True, False):
                with device.deterministic(fixed):
                    try:
                        times.append(measure(work))
                    except RuntimeError as problem:
                        print(f"{name}, {epilogue.name}: {problem}")
                        times.append(float("nan"))
            speeds = 2e-6 * a.numel() * b.shape[1] / times[-1]
            shown = "".join(f"{microseconds:9.1f}" for microseconds in times)
            print(f"{name + ', ' + epilogue.name:50}{shown}{speeds:9.0f}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for option, default in (("batch", 64), ("context", 1024), ("width", 768)):
        parser.add_argument(f"--{option}", type=int, default=default)
    options = parser.parse_args()
    if min(vars(options).values()) < 1:
        raise UserError("--batch, --context and --width must be at least 1")
    if not torch.cuda.is_available():
        raise UserError("this measures a GPU, and PyTorch found none on this machine")
    N, C = options.batch * options.context, options.width
    print(f"N={N:,} C={C} bf16 on {torch.cuda.get_device_name()}; µs")
    rows(N, C)
    x = torch.randn(N, 4 * C, device="cuda", dtype=torch.bfloat16)
    partials = torch.empty(column_sums.partial_count(N), 4 * C, device="cuda")
    print(f"{'gelu':50}{measure(lambda: gelu.gelu(x)):9.1f}")
    backward = measure(lambda: gelu.gelu_backward_(x, x, partials))
    print(f"{'gelu_backward_':50}{backward:9.1f}")


if __name__ == "__main__":
    with one_line_errors():
        main()
