"""How a Triton kernel takes over from the one before it, so that as little time as possible passes.

With "programmatic dependent launch" (CUDA programming guide, from compute capability 9.0), a kernel
starts when all programs of the one before it have started. It loads its weights, and then waits for
the end of that kernel, which has itself waited for all earlier ones.
"""

import torch

from folio import device

if device.can_compile():
    import triton
    from triton import language as tl
    from triton.language.extra import cuda

EARLY = True  # whether a kernel may start before the previous one has ended


def launch_options(x: torch.Tensor) -> dict[str, bool]:
    """The options of a launch that starts before the previous kernel has ended, if possible."""
    early = EARLY and x.is_cuda and torch.cuda.get_device_capability(x.device) >= (9, 0)
    return {"early": early, "launch_pdl": early} if early else {"early": False}


if device.can_compile():

    @triton.jit
    def let_next_start(early: tl.constexpr):
        """Let the next kernel start as soon as all programs of this one have."""
        if early:
            cuda.gdc_launch_dependents()

    @triton.jit
    def wait(early: tl.constexpr):
        """Wait until the previous kernel has ended and its results can be read."""
        if early:
            cuda.gdc_wait()

    @triton.jit
    def add_both(a, b, c, d):
        """For tl.reduce: two sums at once."""
        return a + c, b + d
