"""How many threads PyTorch uses for a step of generation on a CPU."""

import contextlib
from collections.abc import Iterator

import torch

from folio.gpt.model import GPT

# Multiply-adds that one core computes in about 50 ms.
_SMALL = 1_500_000_000
# Read once: torch.set_num_threads also sets the default of threads that are started later.
_SEVERAL = torch.get_num_threads()


@contextlib.contextmanager
def few_threads(model: GPT, tokens: int, rows: int) -> Iterator[None]:
    """In this block, use one thread for a small forward pass on a CPU, and all for a large one.

    tokens: number of tokens that pass through the blocks; rows: number of them whose logits are
    computed. If the model is on a GPU, only the sampling is left for the CPU: one thread.

    PyTorch's operators wait for each other's threads, which spin on their cores (OpenMP). If
    another process uses one of these cores, each of the operators waits until the scheduler takes
    it away from that process, so a step of milliseconds takes ten times as long. On idle cores, a
    second thread saves at most half of the time of a step.

    The setting belongs to the calling thread, so a block must not contain a `yield`: the consumer
    of a generator may continue it in another thread, as Gradio does.
    """
    head = model.transformer.wte.weight
    blocks = 12 * model.params.n_layer * model.params.n_embd**2  # weights in their matrices
    is_small = not head.is_cpu or tokens * blocks + rows * head.numel() <= _SMALL
    before = torch.get_num_threads()
    torch.set_num_threads(1 if is_small else _SEVERAL)
    try:
        yield
    finally:
        torch.set_num_threads(before)
