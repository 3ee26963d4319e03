"""GPT-2 (Radford et al. 2019, section 2.3), with the names and arithmetic of OpenAI's release.

B is the batch size, T the sequence length in tokens, C the number of channels (n_embd), D the
number of channels per attention head, and V the number of rows in the token embedding.
"""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.nn as nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from folio.gpt import cross_entropy
from folio.gpt.params import ModelParams as ModelParams


class KVCache:
    """The attention keys and values of the tokens so far, which later tokens attend to."""

    def __init__(self, model: "GPT", batch_size: int):
        p, weight = model.params, model.transformer.wte.weight
        shape = (p.n_layer, 2, batch_size, p.n_head, p.block_size, p.n_embd // p.n_head)
        self.keys_values = torch.zeros(shape, dtype=weight.dtype, device=weight.device)
        self.length = 0  # number of cached tokens

    def extend(self, layer: int, new: torch.Tensor) -> torch.Tensor:
        """Append keys and values [2, B, n_head, T, D] to a layer's, and return all of them.

        The result is [2, B, n_head, length + T, D]. `length` does not change, so that every layer
        appends at the same position; the caller increases it after the last layer.
        """
        end = self.length + new.shape[3]
        self.keys_values[layer, :, :, :, self.length : end] = new
        return self.keys_values[layer, :, :, :, :end]


class Attention(nn.Module):
    def __init__(self, p: ModelParams):
        super().__init__()
        self.n_head, self.dropout = p.n_head, p.dropout
        self.c_attn = nn.Linear(p.n_embd, 3 * p.n_embd)
        self.c_proj = nn.Linear(p.n_embd, p.n_embd)

    def forward(
        self, x: torch.Tensor, cache: KVCache | None = None, layer: int = 0
    ) -> torch.Tensor:
        B, T, C = x.shape
        qkv = self.c_attn(x).view(B, T, 3, self.n_head, C // self.n_head)
        qkv = qkv.permute(2, 0, 3, 1, 4)
        if cache is not None:
            cache.extend(layer, qkv[1:])
        q, k, v = qkv  # each [B, n_head, T, D]
        x = F.scaled_dot_product_attention(
            q, k, v, dropout_p=self.dropout if self.training else 0.0, is_causal=True
        )
        return self.c_proj(x.transpose(1, 2).reshape(B, T, C))


class MLP(nn.Module):
    def __init__(self, p: ModelParams):
        super().__init__()
        self.c_fc = nn.Linear(p.n_embd, 4 * p.n_embd)
        self.c_proj = nn.Linear(4 * p.n_embd, p.n_embd)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.c_proj(F.gelu(self.c_fc(x), approximate="tanh"))


class Block(nn.Module):
    def __init__(self, p: ModelParams):
        super().__init__()
        self.ln_1 = nn.LayerNorm(p.n_embd)
        self.attn = Attention(p)
        self.ln_2 = nn.LayerNorm(p.n_embd)
        self.mlp = MLP(p)
        self.drop = nn.Dropout(p.dropout)

    def forward(
        self, x: torch.Tensor, cache: KVCache | None = None, layer: int = 0
    ) -> torch.Tensor:
        x = x + self.drop(self.attn(self.ln_1(x), cache, layer))
        return x + self.drop(self.mlp(self.ln_2(x)))


class Transformer(nn.Module):
    """The layers below the head, with OpenAI's names. GPT.hidden runs them."""

    def __init__(self, p: ModelParams, rows: int):
        super().__init__()
        self.wte = nn.Embedding(rows, p.n_embd)
        self.wpe = nn.Embedding(p.block_size, p.n_embd)
        self.drop = nn.Dropout(p.dropout)
        self.h = nn.ModuleList(Block(p) for _ in range(p.n_layer))
        self.ln_f = nn.LayerNorm(p.n_embd)


class GPT(nn.Module):
    """GPT-2 with `rows` rows in the token embedding, which shares its weight with the head.

    `multiplicity` [V] is the number of vocabulary tokens that share each row (by default 1). A row
    shared by m tokens counts m times in the softmax, and each of its tokens gets 1/m of the row's
    probability. The loss is therefore that of a model in which the row is repeated m times (see
    folio/tokens/vocabulary.py).
    """

    log_multiplicity: torch.Tensor | None

    def __init__(self, params: ModelParams, rows: int, multiplicity: np.ndarray | None = None):
        super().__init__()
        self.params = params
        self.gradient_checkpointing = False
        self.unseen_probability = 0.0  # target probability of the last row in `loss`
        self.distill_weight = 0.0  # share of the probabilities `soft` in the targets of `loss`
        self._compiled_blocks: Callable[[torch.Tensor], torch.Tensor] | None = None
        self.transformer = Transformer(params, rows)
        log = None if multiplicity is None else torch.as_tensor(multiplicity).float().log()
        self.register_buffer("log_multiplicity", log, persistent=False)
        self._initialise()

    @torch.no_grad()
    def _initialise(self) -> None:
        """Draw weights from Normal(0, 0.02), as OpenAI did; set biases to 0 and layer norms to 1.

        For projections into the residual stream, the standard deviation is divided by
        sqrt(2 n_layer).
        """
        for name, p in self.named_parameters():
            if name.endswith("bias"):
                p.zero_()
            elif ".ln_" in name:
                p.fill_(1.0)
            elif name.endswith("c_proj.weight"):
                p.normal_(0.0, 0.02 / math.sqrt(2 * self.params.n_layer))
            else:
                p.normal_(0.0, 0.02)

    def hidden(self, x: torch.Tensor, cache: KVCache | None = None) -> torch.Tensor:
        """Map token ids [B, T] to the inputs of the head, [B, T, C].

        A cache, if given, must be empty; it is filled with the tokens' keys and values, so that
        folio.inference.decoder.Decoder can continue from there, token by token.
        """
        t, T = self.transformer, x.shape[1]
        assert self.params.block_size >= T, "more tokens than the context"
        assert not (cache and cache.length), "the cache must be empty: Decoder.step extends it"
        x = t.drop(t.wte(x) + t.wpe(torch.arange(T, device=x.device)))
        if cache is None:
            blocks = self._compiled_blocks or self._run_blocks
            return blocks(x)
        for layer, block in enumerate(t.h):
            x = block(x, cache, layer)
        cache.length += T
        return t.ln_f(x)

    def _run_blocks(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.transformer.h:
            if self.gradient_checkpointing and self.training:
                x = checkpoint(block, x, use_reentrant=False)
            else:
                x = block(x)
        return self.transformer.ln_f(x)

    def compile(self, **options: Any) -> None:
        """Compile the blocks and the final layer norm. options: those of torch.compile.

        The embeddings and the head are not compiled: without compilation, the gradient of the
        embeddings is summed in a fixed order.
        """
        self._compiled_blocks = torch.compile(self._run_blocks, **options)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map token ids [B, T] to logits [B, T, V]."""
        assert self.log_multiplicity is None, "tokens that share a row have no logits of their own"
        return F.linear(self.hidden(x), self.transformer.wte.weight)

    def row_probabilities(self, x: torch.Tensor) -> torch.Tensor:
        """The probabilities of the rows of the embedding after each token of x [B, T]: [B * T, V].

        A row shared by several tokens has the sum of their probabilities.
        """
        logits = F.linear(self.hidden(x).flatten(0, 1), self.transformer.wte.weight)
        if self.log_multiplicity is not None:
            logits = logits.float() + self.log_multiplicity
        return logits.softmax(-1).to(self.transformer.wte.weight.dtype)

    def loss(
        self,
        x: torch.Tensor,
        y: torch.Tensor,
        scale: torch.Tensor | float = 1.0,
        soft: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Mean cross-entropy of y [B, T] given x [B, T] in nats/token, for training.

        soft: probabilities of the rows, [B * T, V], which have the share `distill_weight` in the
        targets. Call `backward` directly on the result: it computes `scale` times the gradient of
        the loss (see cross_entropy.linear_cross_entropy).
        """
        hidden, weight, bias = self.hidden(x), self.transformer.wte.weight, self.log_multiplicity
        hidden, y = hidden.flatten(0, 1), y.flatten()
        loss = cross_entropy.linear_cross_entropy(hidden, weight, bias, y, scale)
        loss = loss if bias is None else loss + bias[y].mean()
        share = 0.0 if soft is None else self.distill_weight
        if soft is not None:
            loss = loss + share * self._smoothing(hidden, y, soft @ weight, scale)
        if bias is not None and self.unseen_probability:
            share = (1 - share) * self.unseen_probability
            loss = loss + share * self._smoothing(hidden, y, weight[-1], scale)
        return loss

    def _smoothing(
        self,
        hidden: torch.Tensor,
        y: torch.Tensor,
        towards: torch.Tensor,
        scale: torch.Tensor | float,
    ) -> torch.Tensor:
        """What the loss increases by if the targets are other tokens than y.

        hidden [N, C], y [N]. towards: the mean row of the other tokens, [C] or [N, C]. A
        cross-entropy depends on its targets only by their mean logit, so label smoothing (Szegedy
        et al. 2016, section 7) needs no other logits. The gradient is multiplied by `scale`, as
        that of the loss.
        """
        rows = F.embedding(y, self.transformer.wte.weight).float()
        difference = (hidden.float() * (rows - towards.float())).sum(1).mean()
        return cross_entropy.scale_gradient(difference, scale)

    def token_losses(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        """The loss of each token in y [B, T] given x [B, T], in nats. The result is [B, T]."""
        weight, bias = self.transformer.wte.weight, self.log_multiplicity
        losses = cross_entropy.token_losses(self.hidden(x).flatten(0, 1), weight, bias, y.flatten())
        return losses.view_as(y) if bias is None else losses.view_as(y) + bias[y]


def parameter_counts(model: GPT) -> dict[str, int]:
    """The number of trained parameters in each part of the model, and their `total`.

    The head adds none, because its weight is the token embedding.
    """
    parts = {
        "token embedding and head": ".wte.",
        "position embedding": ".wpe.",
        "attention": ".attn.",
        "MLP": ".mlp.",
        "layer norms": ".ln_",
    }
    counts = {
        part: sum(p.numel() for name, p in model.named_parameters() if key in name)
        for part, key in parts.items()
    }
    return counts | {"total": sum(p.numel() for p in model.parameters())}
