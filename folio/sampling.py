"""Text from a model, token by token."""

from collections.abc import Iterator

import torch

from folio.model import GPT, Cache


@torch.inference_mode()
def generate(
    model: GPT,
    prompt: list[int],
    tokens: int,
    temperature: float,
    top_k: int | None = None,
    top_p: float | None = None,
    generator: torch.Generator | None = None,
) -> Iterator[int]:
    """Yield `tokens` ids that follow the prompt, which must hold at least one.

    Temperature 0 takes the likeliest each time. top_k keeps the k likeliest; top_p, of these, the
    fewest whose probabilities add up to p (Holtzman et al. 2020, section 3.1). The model sees at
    most its context: beyond that, the last block_size tokens, read anew for each token because
    every one of them then stands at another position.
    """
    assert prompt, "a prompt holds at least one token"
    context = model.params.block_size
    device = next(model.parameters()).device
    ids, cache = list(prompt), None
    for _ in range(tokens):
        if cache is None or cache.length == context:
            cache, unread = Cache(model, 1), ids[-context:]
        else:
            unread = ids[-1:]
        logits = model(torch.tensor([unread], device=device), cache)[0, -1]
        ids.append(_choose(logits.float(), temperature, top_k, top_p, generator))
        yield ids[-1]


def _choose(logits, temperature, top_k, top_p, generator) -> int:
    """Draw an id from logits [V]."""
    if temperature == 0:
        return int(logits.argmax())
    probabilities = torch.softmax((logits - logits.max()) / temperature, -1).cpu()
    likeliest, ids = probabilities.sort(descending=True, stable=True)
    if top_k is not None:
        likeliest = likeliest[:top_k] / likeliest[:top_k].sum()
    if top_p is not None:
        before = likeliest.cumsum(0) - likeliest
        likeliest = likeliest[before < top_p]
    return int(ids[torch.multinomial(likeliest, 1, generator=generator)])
