"""Held-out loss, the same for train and evaluate: in fp32, on a whole text, window by window."""

import numpy as np
import torch

# Tokens that the model reads at once; its head takes few of them at a time (see head.py).
_TOKENS_AT_ONCE = {"cpu": 1_024, "cuda": 65_536, "mps": 8_192}


@torch.inference_mode()
def token_losses(
    model: torch.nn.Module, tokens: np.ndarray, stride: int | None = None
) -> np.ndarray:
    """Cross-entropy in nats of each token but the first, [N - 1] float64, given those before it.

    Windows of the model's context start every `stride` tokens (default: a context, so that they do
    not overlap), and each scores what no earlier one has. With a shorter stride every token but
    the first few is given at least context - stride others.
    """
    context = model.params.block_size
    stride = stride or context
    assert stride <= context, "a longer stride would pass tokens over"
    device = next(model.parameters()).device
    losses = np.empty(len(tokens) - 1)
    training = model.training
    model.eval()
    for starts, length in _batches(len(tokens) - 1, context, stride, device.type):
        windows = np.stack([tokens[s : s + length + 1] for s in starts]).astype(np.int64)
        ids = torch.from_numpy(windows).to(device)
        scored = model.token_losses(ids[:, :-1], ids[:, 1:]).cpu().double().numpy()
        for start, row in zip(starts, scored, strict=True):
            fresh = 0 if start == 0 else context - stride
            losses[start + fresh : start + length] = row[fresh:]
    model.train(training)
    return losses


def _batches(n: int, context: int, stride: int, device: str):
    """(starts, length) of windows that together score n tokens; only the last may be shorter."""
    starts = [0, *range(stride, n - (context - stride), stride)]
    whole = [s for s in starts if s + context <= n]
    at_once = max(1, _TOKENS_AT_ONCE[device] // context)
    for i in range(0, len(whole), at_once):
        yield whole[i : i + at_once], context
    if len(whole) < len(starts):
        yield starts[-1:], n - starts[-1]
