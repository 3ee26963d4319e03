"""The forward pass for a single token, using a KV cache for the preceding ones."""

from collections.abc import Callable
from functools import partial

import torch
from torch.nn import functional as F

from folio.device import capture
from folio.gpt.model import GPT, KVCache

# oneDNN's F.linear. For few rows it is twice as fast as MKL's, which uses one thread for one row
# and slower code on AMD (`python -m benchmarks.generate`). Some builds of PyTorch do not have it.
_ONEDNN_LINEAR = getattr(torch.ops.mkldnn, "_linear_pointwise", None)
_ONEDNN_DTYPES = [torch.float32]
if getattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", bool)():  # by this CPU
    _ONEDNN_DTYPES.append(torch.bfloat16)

_MIN_CAPACITY = 256  # tokens that the first CUDA graph attends to


class Decoder:
    """GPT.hidden for one more token per sequence, followed by `predict`.

    It uses the model's parameters directly: bypassing the modules saves a seventh of the time per
    token on a CPU. On a GPU, a step is one CUDA graph. Its shapes are fixed, so it attends to a
    fixed number of cached tokens, the capacity, through a mask; when the cache outgrows it, a new
    graph is captured with twice the capacity.
    """

    def __init__(self, model: GPT, cache: KVCache, predict: Callable[[torch.Tensor], torch.Tensor]):
        """predict maps the inputs of the head, [B, C], to the result of a step."""
        self.cache, self.transformer, self.predict = cache, model.transformer, predict
        self.blocks = [tuple(block.parameters()) for block in model.transformer.h]
        self.capacity = 0  # tokens that the graph attends to
        self.position = torch.zeros(1, dtype=torch.long, device=cache.keys_values.device)

    def step(self, ids: torch.Tensor) -> torch.Tensor:
        """Append token ids [B] and return the prediction, which the next step will overwrite."""
        cache = self.cache
        if ids.is_cuda:
            if cache.length >= self.capacity:
                self.capacity = min(
                    max(_MIN_CAPACITY, 2 * cache.length), cache.keys_values.shape[4]
                )
                self.position.fill_(cache.length)  # capturing writes to unused positions only
                self._graph = capture(self._step_at_position, ids)
                self.position.fill_(cache.length)
            prediction = self._graph(ids)
        else:
            position_embedding = self.transformer.wpe.weight[cache.length]
            prediction = self.predict(self._hidden(ids, position_embedding, cache.extend, None))
        cache.length += 1
        return prediction

    def _step_at_position(self, ids: torch.Tensor) -> torch.Tensor:
        """A step that reads its position from the device and advances it there."""
        position = self.position
        past = self.cache.keys_values[:, :, :, :, : self.capacity]

        def extend(layer: int, new: torch.Tensor) -> torch.Tensor:
            return past[layer].index_copy_(3, position, new)

        later = torch.arange(self.capacity, device=ids.device) > position
        mask = torch.zeros(self.capacity, device=ids.device).masked_fill(later, -torch.inf)
        position_embedding = self.transformer.wpe.weight[position]
        prediction = self.predict(self._hidden(ids, position_embedding, extend, mask))
        # Capturing runs this more than once; the clamp keeps the position within the cache.
        position.add_(1).clamp_(max=self.capacity - 1)
        return prediction

    def _hidden(
        self,
        ids: torch.Tensor,
        position_embedding: torch.Tensor,
        extend: Callable[[int, torch.Tensor], torch.Tensor],
        mask: torch.Tensor | None,
    ) -> torch.Tensor:
        """Map token ids [B] to the inputs of the head, [B, C].

        extend(layer, new) appends to the cache, like KVCache.extend. mask [T] is added to the
        attention scores.
        """
        t, n_head = self.transformer, self.cache.keys_values.shape[3]
        x = t.wte.weight[ids] + position_embedding
        for layer, block in enumerate(self.blocks):
            x = _block(x, block, n_head, partial(extend, layer), mask)
        return F.layer_norm(x, x.shape[1:], t.ln_f.weight, t.ln_f.bias)


def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """F.linear, using the fastest implementation for a small number of rows."""
    if _ONEDNN_LINEAR and x.device.type == "cpu" and x.dtype in _ONEDNN_DTYPES:
        return _ONEDNN_LINEAR(x, weight, bias, "none", [], "")
    return F.linear(x, weight, bias)


def _block(
    x: torch.Tensor,
    parameters: tuple[torch.Tensor, ...],
    n_head: int,
    extend: Callable[[torch.Tensor], torch.Tensor],
    mask: torch.Tensor | None,
) -> torch.Tensor:
    """model.Block for one token per sequence, x [B, C]. parameters: in the module's order."""
    g1, b1, attn_w, attn_b, proj_w, proj_b, g2, b2, fc_w, fc_b, out_w, out_b = parameters
    B, C = x.shape
    qkv = linear(F.layer_norm(x, (C,), g1, b1), attn_w, attn_b)
    qkv = qkv.view(B, 3, n_head, 1, C // n_head).transpose(0, 1)  # [3, B, n_head, 1, D]
    k, v = extend(qkv[1:])
    y = _attend(qkv[0], k, v, mask)
    x = x + linear(y.reshape(B, C), proj_w, proj_b)
    y = F.gelu(linear(F.layer_norm(x, (C,), g2, b2), fc_w, fc_b), approximate="tanh")
    return x + linear(y, out_w, out_b)


def _attend(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None
) -> torch.Tensor:
    """Attention of one token, q [B, n_head, 1, D], over k and v [B, n_head, T, D]."""
    if mask is None:
        return F.scaled_dot_product_attention(q, k, v)
    # With one query in fp32, PyTorch's attention kernel takes a GPU two to nine times as long.
    scores = torch.add(mask, q @ k.transpose(-1, -2), alpha=q.shape[-1] ** -0.5)
    return scores.softmax(-1).to(v.dtype) @ v  # the mask and the scores are in fp32
