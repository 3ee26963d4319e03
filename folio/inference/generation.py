"""Text generation, token by token."""

from collections.abc import Callable, Iterator

import torch

from folio.device import capture
from folio.gpt.model import GPT, KVCache
from folio.inference.decoder import Decoder, linear

_MIN_TEMPERATURE = 1e-6  # anything lower is greedy: dividing by it would overflow fp32


def generate(
    model: GPT,
    prompt: list[int],
    tokens: int,
    temperature: float,
    top_k: int | None = None,
    top_p: float | None = None,
    generator: torch.Generator | None = None,
) -> Iterator[int]:
    """Yield the ids of `tokens` tokens that continue a prompt, as generate_batch does."""
    prompts = torch.tensor([prompt])
    for ids in generate_batch(model, prompts, tokens, temperature, top_k, top_p, generator):
        yield int(ids)


@torch.inference_mode()
def generate_batch(
    model: GPT,
    prompts: torch.Tensor,
    tokens: int,
    temperature: float,
    top_k: int | None = None,
    top_p: float | None = None,
    generator: torch.Generator | None = None,
) -> Iterator[torch.Tensor]:
    """Yield `tokens` times the next ids [B] of prompts [B, T], T >= 1. The model is in eval mode.

    Temperature 0 is greedy decoding. top_k keeps the k most likely tokens; top_p keeps, of these,
    the fewest whose probabilities add up to p (Holtzman et al. 2020, section 3.1). The prompts draw
    from the generator one after another.

    The model reads at most its context. Once the text is longer, each token takes a forward pass
    over the last block_size tokens, because all of them have moved to another position.
    """
    assert prompts.shape[1], "a prompt must have at least one token"
    assert model.log_multiplicity is None, "tokens that share a row have no logits of their own"
    temperature = 0 if temperature < _MIN_TEMPERATURE else temperature
    context, head = model.params.block_size, model.transformer.wte.weight

    def predict(hidden: torch.Tensor) -> torch.Tensor:
        """Map inputs of the head, [B, C], to greedy ids [B], or to logits [B, V] to draw from."""
        logits = linear(hidden, head).float()
        return logits.argmax(-1) if temperature == 0 else logits

    window = prompts[:, -context:].to(head.device)
    cache = KVCache(model, len(window))
    decoder = Decoder(model, cache, predict)
    predict_window: Callable[[torch.Tensor], torch.Tensor] | None = None
    written, ids = [window], window[:, -1]
    for _ in range(tokens):
        if cache.length == context:
            window = torch.cat(written, 1)[:, -context:]
            written = [window]
            if predict_window is None:
                predict_window = capture(lambda x: predict(model.hidden(x)[:, -1]), window)
            prediction = predict_window(window)
        elif cache.length:
            prediction = decoder.step(ids)
        else:
            prediction = predict(model.hidden(window, cache)[:, -1])
        ids = prediction.clone()  # the next step overwrites the prediction
        if temperature > 0:
            ids = _sample(prediction, temperature, top_k, top_p, generator).to(head.device)
        written.append(ids[:, None])
        yield ids


def _sample(
    logits: torch.Tensor,
    temperature: float,
    top_k: int | None,
    top_p: float | None,
    generator: torch.Generator | None,
) -> torch.Tensor:
    """Draw ids [B] from logits [B, V]."""
    logits = logits - logits.amax(-1, keepdim=True)
    probabilities = torch.softmax(logits / temperature, -1).cpu()
    descending, ids = probabilities.sort(descending=True, stable=True)
    ranks = [_sample_rank(row, top_k, top_p, generator) for row in descending]
    return ids.gather(1, torch.stack(ranks))[:, 0]


def _sample_rank(
    probabilities: torch.Tensor,
    top_k: int | None,
    top_p: float | None,
    generator: torch.Generator | None,
) -> torch.Tensor:
    """Draw an index [1] into probabilities [V], which are in descending order."""
    if top_k is not None:
        probabilities = probabilities[:top_k] / probabilities[:top_k].sum()
    if top_p is not None:
        before = probabilities.cumsum(0) - probabilities
        probabilities = probabilities[before < top_p]
    return torch.multinomial(probabilities, 1, generator=generator)
