"""Text from a model, token by token."""

from collections.abc import Iterator

import torch
from torch.nn import functional as F

from folio.model import GPT, Cache

# oneDNN's F.linear. With few rows it is twice as fast as MKL's, which takes one thread for one
# row, and on AMD not its fastest code (`python -m benchmarks.generate`). Not in every PyTorch.
_ONEDNN = getattr(torch.ops.mkldnn, "_linear_pointwise", None)


def generate(
    model: GPT,
    prompt: list[int],
    tokens: int,
    temperature: float,
    top_k: int | None = None,
    top_p: float | None = None,
    generator: torch.Generator | None = None,
) -> Iterator[int]:
    """Yield `tokens` ids that follow one prompt, as generate_batch does."""
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
    """Yield `tokens` times the next ids [B] of prompts [B, T], which hold at least one token each.

    Temperature 0 takes the likeliest each time. top_k keeps the k likeliest; top_p, of these, the
    fewest whose probabilities add up to p (Holtzman et al. 2020, section 3.1). The prompts draw
    from the generator in turn. The model, in eval mode, sees at most its context: beyond that, the
    last block_size tokens, read anew for each token because every one of them then stands at
    another position.
    """
    assert prompts.shape[1], "a prompt holds at least one token"
    assert model.log_multiplicity is None, "a row that several tokens share has no logit of each"
    context, head = model.params.block_size, model.transformer.wte.weight
    window = prompts[:, -context:].to(head.device)
    cache = Cache(model, len(window))
    decoder = Decoder(model, cache)
    for _ in range(tokens):
        if cache.length == context:
            last = model.hidden(window[:, -context:])[:, -1]
        elif cache.length:
            last = decoder.step(window[:, -1])
        else:
            last = model.hidden(window, cache)[:, -1]
        ids = _choose(_linear(last, head).float(), temperature, top_k, top_p, generator)
        window = torch.cat([window[:, 1 - context :], ids[:, None].to(window.device)], 1)
        yield ids


class Decoder:
    """GPT.hidden for one token after those in the cache, without what is for training.

    Calling no modules saves a seventh of a token's time on a CPU.
    """

    def __init__(self, model: GPT, cache: Cache):
        self.cache, self.transformer = cache, model.transformer
        self.blocks = [tuple(block.parameters()) for block in model.transformer.h]

    def step(self, ids: torch.Tensor) -> torch.Tensor:
        """Token ids [B] to what the head reads, [B, C].

        The position is in two places alone: the row of wpe, and the part of the cache that
        Cache.extend writes and returns. All shapes but that part's are the same for each token.
        """
        t, cache = self.transformer, self.cache
        x = t.wte.weight[ids] + t.wpe.weight[cache.length]
        for layer, block in enumerate(self.blocks):
            x = _block(x, block, cache, layer)
        cache.length += 1
        return F.layer_norm(x, x.shape[1:], t.ln_f.weight, t.ln_f.bias)


def _block(
    x: torch.Tensor, parameters: tuple[torch.Tensor, ...], cache: Cache, layer: int
) -> torch.Tensor:
    """model.Block on one token each, [B, C]; its parameters are in the order of their making."""
    g1, b1, attn_w, attn_b, proj_w, proj_b, g2, b2, fc_w, fc_b, out_w, out_b = parameters
    (B, C), (_, _, _, n_head, _, D) = x.shape, cache.keys_values.shape
    qkv = _linear(F.layer_norm(x, (C,), g1, b1), attn_w, attn_b)
    qkv = qkv.view(B, 3, n_head, 1, D).transpose(0, 1)  # [3, B, n_head, 1, D]
    k, v = cache.extend(layer, qkv[1:])
    y = F.scaled_dot_product_attention(qkv[0], k, v)
    x = x + _linear(y.reshape(B, C), proj_w, proj_b)
    y = F.gelu(_linear(F.layer_norm(x, (C,), g2, b2), fc_w, fc_b), approximate="tanh")
    return x + _linear(y, out_w, out_b)


def _linear(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None
) -> torch.Tensor:
    if _ONEDNN and x.device.type == "cpu":
        return _ONEDNN(x, weight, bias, "none", [], "")
    return F.linear(x, weight, bias)


def _choose(
    logits: torch.Tensor,
    temperature: float,
    top_k: int | None,
    top_p: float | None,
    generator: torch.Generator | None,
) -> torch.Tensor:
    """Draw ids [B] from logits [B, V]."""
    if temperature == 0:
        return logits.argmax(-1)
    logits = logits - logits.amax(-1, keepdim=True)
    probabilities = torch.softmax(logits / temperature, -1).cpu()
    likeliest, ids = probabilities.sort(descending=True, stable=True)
    drawn = [_draw(row, top_k, top_p, generator) for row in likeliest]
    return ids.gather(1, torch.stack(drawn))[:, 0]


def _draw(
    likeliest: torch.Tensor,
    top_k: int | None,
    top_p: float | None,
    generator: torch.Generator | None,
) -> torch.Tensor:
    """Draw a place [1] in probabilities [V], which are sorted."""
    if top_k is not None:
        likeliest = likeliest[:top_k] / likeliest[:top_k].sum()
    if top_p is not None:
        before = likeliest.cumsum(0) - likeliest
        likeliest = likeliest[before < top_p]
    return torch.multinomial(likeliest, 1, generator=generator)
