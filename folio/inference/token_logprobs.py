"""How sure a model is of each token of a text, and what it held likely instead."""

from dataclasses import dataclass

import numpy as np
import torch
from torch.nn import functional as F

from folio.gpt.model import GPT

_ROWS = 256  # tokens whose logits are held at once: 51 MB at GPT-2's vocabulary


@dataclass(frozen=True)
class TokenLogprobs:
    """Of each token of a text but the first, N in all; probabilities are at temperature 1."""

    probability: np.ndarray  # [N] float32: of the token itself
    alternatives: np.ndarray  # [N, k] int64: the likeliest ids in its place, likeliest first
    probabilities: np.ndarray  # [N, k] float32: theirs


@torch.inference_mode()
def token_logprobs(model: GPT, ids: list[int], k: int = 5) -> TokenLogprobs:
    """What the model, in eval mode, expected at each place of a text of at least two tokens.

    A text no longer than the context takes one forward pass. A longer one is read in windows that
    move on by a quarter of the context, so that a token far into it is judged by at least three
    quarters; `generate`, which reads it anew for each token, gave it all of the context.
    """
    assert len(ids) > 1, "the first token of a text has nothing before it"
    assert model.log_multiplicity is None, "a row that several tokens share has no logit of each"
    head = model.transformer.wte.weight
    context = model.params.block_size
    x, y = torch.tensor(ids[:-1], device=head.device), torch.tensor(ids[1:], device=head.device)
    found, done = [], 0
    while done < len(x):
        end = min(len(x), max(context, done + max(1, context // 4)))
        start = max(0, end - context)
        new = model.hidden(x[None, start:end])[0, done - start :]
        for rows, targets in zip(new.split(_ROWS), y[done:end].split(_ROWS), strict=True):
            found.append(_expected(F.linear(rows, head).float(), targets, k))
        done = end
    return TokenLogprobs(*(torch.cat(parts).cpu().numpy() for parts in zip(*found, strict=True)))


def _expected(logits: torch.Tensor, targets: torch.Tensor, k: int) -> tuple[torch.Tensor, ...]:
    """Logits [N, V] and the ids that came [N] to the three fields of TokenLogprobs."""
    scale = logits.logsumexp(-1, keepdim=True)
    likeliest, ids = logits.topk(min(k, logits.shape[-1]))
    own = logits.gather(1, targets[:, None])
    return (own - scale).exp()[:, 0], ids, (likeliest - scale).exp()
