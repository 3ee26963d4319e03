"""Text from a model, token by token."""

from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch.nn import functional as F

from folio.device import capture
from folio.gpt.model import GPT, Cache

# oneDNN's F.linear. With few rows it is twice as fast as MKL's, which takes one thread for one
# row, and on AMD not its fastest code (`python -m benchmarks.generate`). Not in every PyTorch.
_ONEDNN = getattr(torch.ops.mkldnn, "_linear_pointwise", None)

_COLD = 1e-6  # a temperature below it is 0: fp32 would divide by nothing

_LEAST = 256  # tokens that a GPU's graph attends to


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
    temperature = 0 if temperature < _COLD else temperature
    context, head = model.params.block_size, model.transformer.wte.weight

    def answer(last: torch.Tensor) -> torch.Tensor:
        """What the head reads, [B, C], to the likeliest ids [B] or else to logits [B, V]."""
        logits = _linear(last, head).float()
        return logits.argmax(-1) if temperature == 0 else logits

    window = prompts[:, -context:].to(head.device)
    cache = Cache(model, len(window))
    decoder, reread, written, ids = Decoder(model, cache, answer), None, [window], window[:, -1]
    for _ in range(tokens):
        if cache.length == context:
            window = torch.cat(written, 1)[:, -context:]
            written = [window]
            reread = reread or capture(lambda seen: answer(model.hidden(seen)[:, -1]), window)
            found = reread(window)
        elif cache.length:
            found = decoder.step(ids)
        else:
            found = answer(model.hidden(window, cache)[:, -1])
        ids = found.clone()  # the next step overwrites it
        if temperature > 0:
            ids = _choose(found, temperature, top_k, top_p, generator).to(head.device)
        written.append(ids[:, None])
        yield ids


class Decoder:
    """GPT.hidden for one token after those in the cache, without what is for training.

    Calling no modules saves a seventh of a token's time on a CPU. On a GPU a token is one CUDA
    graph, so that all shapes stay the same: each token attends to a cache of a fixed capacity
    through a mask, and there is another graph for twice the capacity.
    """

    def __init__(self, model: GPT, cache: Cache, answer: Callable[[torch.Tensor], torch.Tensor]):
        """answer is done with what the head reads, [B, C], and part of the graph."""
        self.cache, self.transformer, self.answer = cache, model.transformer, answer
        self.blocks = [tuple(block.parameters()) for block in model.transformer.h]
        self.capacity = 0  # tokens that the graph attends to
        self.position = torch.zeros(1, dtype=torch.long, device=cache.keys_values.device)

    def step(self, ids: torch.Tensor) -> torch.Tensor:
        """Token ids [B] to answer's result, which the next step overwrites."""
        cache = self.cache
        if ids.is_cuda:
            if cache.length >= self.capacity:
                self.capacity = min(max(_LEAST, 2 * cache.length), cache.keys_values.shape[4])
                self.position.fill_(cache.length)  # where to record it spoils nothing
                self._recorded = capture(self._static, ids)
                self.position.fill_(cache.length)
            found = self._recorded(ids)
        else:
            place = self.transformer.wpe.weight[cache.length]
            found = self.answer(self._hidden(ids, place, cache.extend, None))
        cache.length += 1
        return found

    def _static(self, ids: torch.Tensor) -> torch.Tensor:
        """A step at a position that the device alone knows, and moves on."""
        position = self.position
        past = self.cache.keys_values[:, :, :, :, : self.capacity]

        def extend(layer: int, new: torch.Tensor) -> torch.Tensor:
            return past[layer].index_copy_(3, position, new)

        later = torch.arange(self.capacity, device=ids.device) > position
        mask = torch.zeros(self.capacity, device=ids.device).masked_fill(later, -torch.inf)
        found = self.answer(self._hidden(ids, self.transformer.wpe.weight[position], extend, mask))
        position.add_(1).clamp_(max=self.capacity - 1)  # to record it, it is done beyond the end
        return found

    def _hidden(
        self,
        ids: torch.Tensor,
        place: torch.Tensor,
        extend: Callable[[int, torch.Tensor], torch.Tensor],
        mask: torch.Tensor | None,
    ) -> torch.Tensor:
        t, n_head = self.transformer, self.cache.keys_values.shape[3]
        x = t.wte.weight[ids] + place
        for layer, block in enumerate(self.blocks):
            x = _block(x, block, n_head, partial(extend, layer), mask)
        return F.layer_norm(x, x.shape[1:], t.ln_f.weight, t.ln_f.bias)


def _block(
    x: torch.Tensor,
    parameters: tuple[torch.Tensor, ...],
    n_head: int,
    extend: Callable[[torch.Tensor], torch.Tensor],
    mask: torch.Tensor | None,
) -> torch.Tensor:
    """model.Block on one token each, [B, C]; its parameters are in the order of their making."""
    g1, b1, attn_w, attn_b, proj_w, proj_b, g2, b2, fc_w, fc_b, out_w, out_b = parameters
    B, C = x.shape
    qkv = _linear(F.layer_norm(x, (C,), g1, b1), attn_w, attn_b)
    qkv = qkv.view(B, 3, n_head, 1, C // n_head).transpose(0, 1)  # [3, B, n_head, 1, D]
    k, v = extend(qkv[1:])
    y = _attend(qkv[0], k, v, mask)
    x = x + _linear(y.reshape(B, C), proj_w, proj_b)
    y = F.gelu(_linear(F.layer_norm(x, (C,), g2, b2), fc_w, fc_b), approximate="tanh")
    return x + _linear(y, out_w, out_b)


def _attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None):
    """Attention of one token, q [B, n_head, 1, D], over k and v [B, n_head, T, D]."""
    if mask is None:
        return F.scaled_dot_product_attention(q, k, v)
    # In fp32 and with one query PyTorch's kernel takes a GPU two to nine times as long.
    scores = torch.add(mask, q @ k.transpose(-1, -2), alpha=q.shape[-1] ** -0.5)
    return scores.softmax(-1) @ v


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
