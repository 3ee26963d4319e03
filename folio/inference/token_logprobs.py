"""The log-probabilities that a model assigns to the tokens of a text and to their alternatives."""

from dataclasses import dataclass

import numpy as np
import torch
from torch.nn import functional as F

from folio.gpt.model import GPT
from folio.inference.threads import few_threads

_CHUNK_ROWS = 256  # tokens whose logits are in memory at once: 51 MB at GPT-2's vocabulary


@dataclass(frozen=True)
class TokenLogprobs:
    """Natural log-probabilities at temperature 1, for all tokens except the first."""

    logprobs: np.ndarray  # [N] float32: of the text's own tokens
    top_ids: np.ndarray  # [N, k] int64: the k most likely tokens there, most likely first
    top_logprobs: np.ndarray  # [N, k] float32: of top_ids


@torch.inference_mode()
def token_logprobs(model: GPT, ids: list[int], k: int = 5) -> TokenLogprobs:
    """The log-probabilities of a text of at least two tokens. The model must be in eval mode.

    ids [N + 1]; k is capped at the vocabulary size.

    A text that fits in the context takes one forward pass. A longer one is processed in windows
    that advance by a quarter of the context, so a token after the first window is predicted from at
    least three quarters of a context. (`generate` always uses the full context.)
    """
    assert len(ids) > 1, "the first token of a text has no probability"
    assert model.log_multiplicity is None, "tokens that share a row have no logits of their own"
    head = model.transformer.wte.weight
    context = model.params.block_size
    x, y = torch.tensor(ids[:-1], device=head.device), torch.tensor(ids[1:], device=head.device)
    chunks: list[tuple[torch.Tensor, ...]] = []
    done = 0
    while done < len(x):
        end = min(len(x), max(context, done + max(1, context // 4)))
        start = max(0, end - context)
        with few_threads(model, end - start, end - done):
            hidden = model.hidden(x[None, start:end])[0, done - start :]
            parts = zip(hidden.split(_CHUNK_ROWS), y[done:end].split(_CHUNK_ROWS), strict=True)
            chunks += [_logprobs(F.linear(rows, head).float(), own, k) for rows, own in parts]
        done = end
    return TokenLogprobs(*(torch.cat(parts).cpu().numpy() for parts in zip(*chunks, strict=True)))


def _logprobs(logits: torch.Tensor, targets: torch.Tensor, k: int) -> tuple[torch.Tensor, ...]:
    """Map logits [N, V] and target ids [N] to the three fields of TokenLogprobs."""
    normaliser = logits.logsumexp(-1, keepdim=True)
    top_logits, top_ids = logits.topk(min(k, logits.shape[-1]))
    target_logits = logits.gather(1, targets[:, None])
    return (target_logits - normaliser)[:, 0], top_ids, top_logits - normaliser
