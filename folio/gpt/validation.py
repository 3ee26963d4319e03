"""The loss over an entire text, window by window, in fp32; used by both train and evaluate."""

from collections.abc import Iterator

import numpy as np
import torch

from folio.distributed import ONE_PROCESS, Group
from folio.gpt.model import GPT
from folio.progress import Track, untracked

# Tokens per forward pass; the head computes the logits of few at a time (see cross_entropy.py).
_BATCH_TOKENS = {"cpu": 1_024, "cuda": 65_536, "mps": 8_192}


@torch.inference_mode()
def token_losses(
    model: GPT,
    tokens: np.ndarray,
    stride: int | None = None,
    track: Track = untracked,
    description: str = "",
    group: Group = ONE_PROCESS,
) -> np.ndarray:
    """The loss of each token except the first, given those before it, in nats: [N - 1] float64.

    tokens [N]. Windows as long as the context start every `stride` tokens, and each scores only the
    tokens that no earlier window has scored. The default stride is the context length, so windows
    do not overlap; with a shorter one, every token after the first window is predicted from at
    least context - stride tokens. The model is put in eval mode, then back in its previous mode.
    `track` may show the progress, with the description. The processes of the group, each of which
    must pass the same arguments, share the work, and all return all losses.
    """
    context = model.params.block_size
    stride = stride or context
    assert stride <= context, "a stride longer than the context would skip tokens"
    device = next(model.parameters()).device
    losses = np.zeros(len(tokens) - 1)
    training = model.training
    model.eval()
    batches = list(_batches(len(tokens) - 1, context, stride, device.type))
    rounds = range(0, len(batches), group.count)
    for first in track(rounds, description):
        number = first + group.rank
        # With sharded weights, all processes must take part in each forward pass.
        starts, length = batches[min(number, len(batches) - 1)]
        windows = np.stack([tokens[s : s + length + 1] for s in starts]).astype(np.int64)
        ids = torch.from_numpy(windows).to(device)
        scored = model.token_losses(ids[:, :-1], ids[:, 1:]).cpu().double().numpy()
        for start, row in zip(starts, scored, strict=True) if number < len(batches) else ():
            overlap = 0 if start == 0 else context - stride
            losses[start + overlap : start + length] = row[overlap:]
    model.train(training)
    if group.count > 1:  # the others have zeros where this process has losses
        losses = group.sum_(torch.from_numpy(losses)).numpy()
    return losses


def _batches(
    n: int, context: int, stride: int, device_type: str
) -> Iterator[tuple[list[int], int]]:
    """Yield (starts, length) of windows that together score n tokens; the last may be shorter."""
    starts = [0, *range(stride, n - (context - stride), stride)]
    full = [s for s in starts if s + context <= n]
    batch_size = max(1, _BATCH_TOKENS[device_type] // context)
    for i in range(0, len(full), batch_size):
        yield full[i : i + batch_size], context
    if len(full) < len(starts):
        yield starts[-1:], n - starts[-1]
