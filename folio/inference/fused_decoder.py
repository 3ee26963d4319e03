"""Text generation with the kernels of decode_kernels.py: a token is a single CUDA graph.

The position is on the device, so one graph serves the whole context, and attention reads only what
the cache contains. The graph also chooses the next token and appends it to the text, so the host
only replays it.
"""

from collections.abc import Callable, Iterator
from functools import partial
from weakref import WeakKeyDictionary

import torch
from torch.nn import functional as F

from folio.device import capture
from folio.gpt.model import GPT, KVCache
from folio.inference import decode_kernels as kernels
from folio.inference.attend_kernel import attend, attend_and_project
from folio.inference.choose_kernel import Chooser, Options
from folio.inference.fixed_point import MARK

_AT_ONCE = 8  # tokens that the host hands out together


def can_fuse(model: GPT) -> bool:
    """Whether the kernels run where the model is, and support its sizes."""
    p = model.params
    supported = p.n_embd // p.n_head in (16, 32, 64, 128) and p.n_embd <= 2048
    return supported and kernels.run_on(model.transformer.wte.weight)


def generate(
    model: GPT,
    prompts: torch.Tensor,
    tokens: int,
    options: Options,
    generator: torch.Generator | None,
) -> Iterator[torch.Tensor]:
    """generation.generate_batch for a model that can_fuse.

    The decoder, with its graphs and its cache, is kept for the next text of the same model, number
    of prompts and options, also if this one is not read to its end: capturing a graph takes as long
    as hundreds of tokens. Only the last decoder is kept, and only as long as its model exists.
    """
    assert can_fuse(model), "the fused kernels need a GPU with Triton"
    weights = list(model.parameters())
    key = (len(prompts), options, weights[0].dtype, *(p.data_ptr() for p in weights))
    kept_key, decoder = _kept.pop(model, (None, None))  # no other thread can use it meanwhile
    if decoder is None or kept_key != key:
        decoder = None  # frees its memory
        _kept.clear()
        decoder = FusedDecoder(model, len(prompts), options)
    decoder.chooser.reset(int(torch.randint(2**62, (1,), generator=generator)))
    try:
        yield from decoder.generate(model, prompts, tokens)
    finally:
        _kept.clear()
        _kept[model] = key, decoder


class FusedDecoder:
    """Continues a fixed number of texts. Holds no reference to the model, only to its weights."""

    def __init__(self, model: GPT, batch: int, options: Options):
        p, t = model.params, model.transformer
        self.transformer, self.cache = t, KVCache(model, batch)
        self.blocks = [tuple(block.parameters()) for block in t.h]
        where, n = t.wte.weight.device, p.n_embd
        # For batches of a wider model, `mlp` has few registers left.
        small = kernels.SMALL_BATCH if n <= 1_280 else 1
        self.context, self.is_small = p.block_size, batch <= small
        half = partial(torch.empty, dtype=t.wte.weight.dtype, device=where)  # or fp32
        exact = partial(torch.empty, dtype=torch.float32, device=where)
        zeros = partial(torch.zeros, dtype=torch.int64, device=where)
        # The texts in the context, and one token more; the position of the last token of each.
        self.texts, self.positions = zeros((batch, self.context + 1)), zeros(batch)
        rows = len(t.wte.weight)
        self.largest: torch.Tensor | None = None  # logits; see Chooser
        if self.is_small:  # the residual stream before and after each part of each layer
            self.x = zeros((2 * p.n_layer + 1, batch, n + MARK))
            self.qkv = exact((batch, 3 * n))
            self.logits = exact((batch, -(-rows // 16) * 16))[:, :rows]  # each row is aligned
            rows_per_program, _ = kernels.rows_and_warps(t.wte.weight, batch)
            self.largest = zeros((batch, -(-rows // rows_per_program)))
        else:
            self.x = exact((batch, n))
            self.normal, self.attended = half((batch, n)), half((batch, n))
        self.chooser = Chooser(batch, rows, options, where)
        self._step: Callable[[torch.Tensor], None] | None = None
        self._slide: Callable[[torch.Tensor], None] | None = None
        self._nothing = torch.empty(0, device=where)  # the input of the graphs

    def generate(self, model: GPT, prompts: torch.Tensor, tokens: int) -> Iterator[torch.Tensor]:
        """Yield the ids [B] of each of `tokens` tokens after prompts [B, T].

        After the first token, they are computed _AT_ONCE at a time: to copy each by itself would
        take as long as a few kernels.
        """
        if tokens < 1:
            return
        window = prompts[:, -self.context :].to(self.texts.device)
        length = window.shape[1]
        self.texts[:, :length] = window
        self.positions.fill_(length - 1)
        self.cache.length = 0
        hidden = model.hidden(window, self.cache)[:, -1]
        self._choose(F.linear(hidden, self.transformer.wte.weight))
        yield self.texts[:, length].clone()
        tokens -= 1
        while tokens > 0:
            new = 1
            if length < self.context:
                new = min(_AT_ONCE, tokens, self.context - length)
                self._step = self._step or self._capture(self._next)
                for _ in range(new):
                    self._step(self._nothing)
                length += new
            else:
                self._slide = self._slide or self._capture(lambda: self._next_beyond(model))
                self._slide(self._nothing)
            tokens -= new
            yield from self.texts[:, length - new + 1 : length + 1].t().clone()

    def _capture(self, work: Callable[[], None]) -> Callable[[torch.Tensor], None]:
        """Capture work, which is run once before, and restore the state that it has changed."""
        state = (self.texts, self.positions, self.chooser.draws)
        before = [tensor.clone() for tensor in state]
        captured = capture(lambda _: work(), self._nothing)
        for tensor, value in zip(state, before, strict=True):
            tensor.copy_(value)
        return captured

    def _choose(self, logits: torch.Tensor, largest: torch.Tensor | None = None) -> None:
        self.chooser(logits, self.texts, self.positions, largest)

    def _next(self) -> None:
        """Append a token to each text in the context."""
        t = self.transformer
        kernels.embed(self.texts, self.positions, t.wte.weight, t.wpe.weight, self.x)
        if self.is_small:
            self._compute_small_logits()
        else:
            self.logits = self._large_logits()
        self._choose(self.logits, self.largest)

    def _compute_small_logits(self) -> None:
        """Write the logits [B, V] after the last tokens, in three kernels per layer."""
        t, x = self.transformer, self.x
        for layer, block in enumerate(self.blocks):
            g1, b1, attn_w, attn_b, proj_w, proj_b, g2, b2, fc_w, fc_b, out_w, out_b = block
            before, between, after = x[2 * layer : 2 * layer + 3]
            kernels.project(before, (g1, b1), attn_w, attn_b, self.qkv)
            keys_values = self.cache.keys_values[layer]
            attend_and_project(
                self.qkv, keys_values, self.positions, proj_w, proj_b, before, between
            )  # fmt: skip
            kernels.mlp(between, (g2, b2), (fc_w, fc_b), (out_w, out_b), after)
        norm = (t.ln_f.weight, t.ln_f.bias)
        kernels.project(x[-1], norm, t.wte.weight, None, self.logits, self.largest)

    def _large_logits(self) -> torch.Tensor:
        """The logits with cuBLAS's products, in eight kernels per layer."""
        t, x, normal = self.transformer, self.x, self.normal
        delta = None  # what the last product adds to x
        for layer, block in enumerate(self.blocks):
            g1, b1, attn_w, attn_b, proj_w, proj_b, g2, b2, fc_w, fc_b, out_w, out_b = block
            kernels.normalise(x, delta, g1, b1, normal)
            qkv = F.linear(normal, attn_w, attn_b)
            attend(qkv, self.cache.keys_values[layer], self.positions, self.attended)
            kernels.normalise(x, F.linear(self.attended, proj_w, proj_b), g2, b2, normal)
            mlp = F.gelu(F.linear(normal, fc_w, fc_b), approximate="tanh")
            delta = F.linear(mlp, out_w, out_b)
        kernels.normalise(x, delta, t.ln_f.weight, t.ln_f.bias, normal)
        return F.linear(normal, t.wte.weight)

    def _next_beyond(self, model: GPT) -> None:
        """Append a token to each text that is longer than the context, and forget its first."""
        self.texts[:, :-1] = self.texts[:, 1:].clone()
        self.positions.fill_(self.context - 1)
        hidden = model.hidden(self.texts[:, :-1].clamp(min=0))[:, -1]
        self._choose(F.linear(hidden, self.transformer.wte.weight))


_kept: WeakKeyDictionary[GPT, tuple[tuple[object, ...], FusedDecoder]] = WeakKeyDictionary()
