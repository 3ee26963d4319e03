"""Text generation, token by token."""

import math
from collections.abc import Callable, Iterator

import torch

from folio.device import capture
from folio.errors import UserError
from folio.gpt.model import GPT, KVCache
from folio.inference import fused_decoder
from folio.inference.decoder import Decoder, linear
from folio.inference.threads import few_threads

NOT_FINITE = -1  # in place of a token id
_TOP = 1_000  # tokens; usually enough for a top_p of 0.95
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
    """Yield the ids of `tokens` tokens that continue a prompt; see generate_batch.

    Raises UserError if the model's logits are NaN or infinite.
    """
    prompts = torch.tensor([prompt])
    for ids in generate_batch(model, prompts, tokens, temperature, top_k, top_p, generator):
        if (token := int(ids)) == NOT_FINITE:
            hint = "its weights are too large or damaged; choose another model"
            if model.transformer.wte.weight.dtype == torch.float16:
                hint = "its values may be too large for fp16; choose bf16 or fp32"
            raise UserError(f"the model computes values that are NaN or infinite: {hint}")
        yield token


@torch.inference_mode()
def generate_batch(
    model: GPT,
    prompts: torch.Tensor,
    tokens: int,
    temperature: float,
    top_k: int | None = None,
    top_p: float | None = None,
    generator: torch.Generator | None = None,
    fused: bool | None = None,
) -> Iterator[torch.Tensor]:
    """Continue prompts [B, T], T >= 1, by `tokens` tokens each, and yield the ids [B] of each step.

    The model must be in eval mode. Temperature 0 is greedy decoding. top_k keeps the k most likely
    tokens; from these, top_p keeps the smallest set whose probabilities add up to p (Holtzman et
    al. 2020, section 3.1), and at least the most likely token. The prompts take turns drawing from
    the generator. The id is NOT_FINITE for a prompt whose logits are NaN or infinite.

    fused: whether to use the kernels of fused_decoder; by default, wherever they run and support
    the model (can_fuse), that is, on most GPUs. They are faster. The same seed gives the same text
    on the same GPU, but not the text of the other path, because they have random numbers of their
    own, keep all tokens as likely as the last one that top_k or top_p keeps, and round differently.

    Once the text is longer than the context, each token requires a full forward pass over the last
    block_size tokens, because the position of every token has changed.
    """
    assert prompts.shape[1], "a prompt must have at least one token"
    assert model.log_multiplicity is None, "tokens that share a row have no logits of their own"
    assert math.isfinite(temperature), "temperature must be a number"
    temperature = 0 if temperature < _MIN_TEMPERATURE else temperature
    if fused or (fused is None and fused_decoder.can_fuse(model)):
        options = (temperature, top_k, top_p)
        yield from fused_decoder.generate(model, prompts, tokens, options, generator)
        return
    context, head = model.params.block_size, model.transformer.wte.weight

    def predict(hidden: torch.Tensor) -> torch.Tensor:
        """Map inputs of the head, [B, C], to greedy ids [B], or to logits [B, V] for sampling."""
        logits = linear(hidden, head).float()
        return _most_likely(logits) if temperature == 0 else logits

    window = prompts[:, -context:].to(head.device)
    cache = KVCache(model, len(window))
    decoder = Decoder(model, cache, predict)
    predict_window: Callable[[torch.Tensor], torch.Tensor] | None = None
    written, ids = [window], window[:, -1]
    for _ in range(tokens):
        if cache.length == context:
            window = torch.cat(written, 1)[:, -context:]
            written = [window]
        passed = len(window) if 0 < cache.length < context else window.numel()
        with few_threads(model, passed, len(window)):
            if cache.length == context:
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
        yield ids
        ids = ids.clamp(min=0)  # NOT_FINITE has no embedding
        written.append(ids[:, None])


def _most_likely(logits: torch.Tensor) -> torch.Tensor:
    """The ids [B] of the largest logits [B, V]; NOT_FINITE if one of them is NaN or infinite."""
    largest, ids = logits.max(-1)  # NaN counts as the largest
    return torch.where(largest.isfinite(), ids, NOT_FINITE)


def _sample(
    logits: torch.Tensor,
    temperature: float,
    top_k: int | None,
    top_p: float | None,
    generator: torch.Generator | None,
) -> torch.Tensor:
    """Sample ids [B] from logits [B, V]."""
    logits = logits - logits.amax(-1, keepdim=True)
    probabilities = torch.softmax(logits / temperature, -1).cpu()
    return torch.cat([_sample_id(row, top_k, top_p, generator) for row in probabilities])


def _sample_id(
    probabilities: torch.Tensor,
    top_k: int | None,
    top_p: float | None,
    generator: torch.Generator | None,
) -> torch.Tensor:
    """Sample an id [1] from probabilities [V]."""
    if not probabilities.amax().isfinite():  # NaN counts as the largest
        return torch.tensor([NOT_FINITE])
    descending, ids = _sort(probabilities, top_k, top_p)
    if top_k is not None:
        descending = descending[:top_k] / descending[:top_k].sum()
    if top_p is not None:
        kept = descending.cumsum(0) - descending < top_p
        kept[0] = True  # in fp32, a tiny top_p is 0
        descending = descending[kept]
    return ids[torch.multinomial(descending, 1, generator=generator)]


def _sort(
    probabilities: torch.Tensor, top_k: int | None, top_p: float | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """The probabilities in descending order, and their ids; equal ones in the order of their ids.

    Leaves out unlikely tokens if top_k or top_p excludes them anyway: sorting the whole vocabulary
    takes 4 ms, as long as the rest of a small model's step.
    """
    if top_k is not None or top_p is not None:
        least = probabilities.topk(min(_TOP, len(probabilities))).values[-1]
        ids = (probabilities >= least).nonzero()[:, 0]
        descending, order = probabilities[ids].sort(descending=True, stable=True)
        total = descending.sum().item()
        if (top_k or 0) <= len(ids) and (top_k or total > (top_p or 1) + 1e-4):
            return descending, ids[order]
    return probabilities.sort(descending=True, stable=True)
