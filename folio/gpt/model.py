"""GPT-2 (Radford et al. 2019, section 2.3), with the names and the arithmetic of OpenAI's release.

B is the batch, T the time (tokens), C the channels (n_embd), V the rows of the token embedding.
"""

import math
from dataclasses import dataclass
from typing import Annotated

import numpy as np
import torch
import torch.nn as nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from folio.gpt import cross_entropy


@dataclass(frozen=True, kw_only=True)
class ModelParams:
    n_layer: Annotated[int, ">= 1"]  # blocks
    n_head: Annotated[int, ">= 1"]  # attention heads a block
    n_embd: Annotated[int, ">= 1"]  # channels; a multiple of n_head
    block_size: Annotated[int, ">= 2"]  # tokens of context
    dropout: Annotated[float, ">= 0, < 1"]  # after the embeddings, in attention, after projections

    def __post_init__(self):
        if self.n_embd % self.n_head:
            nearest = max(1, round(self.n_embd / self.n_head)) * self.n_head
            raise ValueError(
                f"n_embd: {self.n_embd} is not divisible by n_head {self.n_head}; take {nearest}"
            )


class Cache:
    """The keys and values of what the model has read, so that it reads each token once."""

    def __init__(self, model: "GPT", batch_size: int):
        p, weight = model.params, model.transformer.wte.weight
        shape = (p.n_layer, 2, batch_size, p.n_head, p.block_size, p.n_embd // p.n_head)
        self.keys_values = torch.zeros(shape, dtype=weight.dtype, device=weight.device)
        self.length = 0  # tokens read

    def extend(self, layer: int, new: torch.Tensor) -> torch.Tensor:
        """Take in a layer's new keys and values [2, B, n_head, T, D]; return all of them so far."""
        end = self.length + new.shape[3]
        self.keys_values[layer, :, :, :, self.length : end] = new
        return self.keys_values[layer, :, :, :, :end]  # [2, B, n_head, length + T, D]


class Attention(nn.Module):
    def __init__(self, p: ModelParams):
        super().__init__()
        self.n_head, self.dropout = p.n_head, p.dropout
        self.c_attn = nn.Linear(p.n_embd, 3 * p.n_embd)
        self.c_proj = nn.Linear(p.n_embd, p.n_embd)

    def forward(self, x: torch.Tensor, cache: Cache | None = None, layer: int = 0) -> torch.Tensor:
        B, T, C = x.shape
        qkv = self.c_attn(x).view(B, T, 3, self.n_head, C // self.n_head)
        qkv = qkv.permute(2, 0, 3, 1, 4)
        if cache is not None:
            cache.extend(layer, qkv[1:])
        q, k, v = qkv  # each [B, n_head, T, C / n_head]
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

    def forward(self, x: torch.Tensor, cache: Cache | None = None, layer: int = 0) -> torch.Tensor:
        x = x + self.drop(self.attn(self.ln_1(x), cache, layer))
        return x + self.drop(self.mlp(self.ln_2(x)))


class GPT(nn.Module):
    """GPT-2 over `rows` token rows; its head is the token embedding.

    `multiplicity` [V] says how many tokens of the vocabulary each row stands for (1 each when not
    given): a row that stands for m tokens counts m times in the softmax, and each of its tokens has
    one m-th of the row's probability. So the loss is that of the model in which the row is written
    out m times (see vocabulary.py).
    """

    def __init__(self, params: ModelParams, rows: int, multiplicity: np.ndarray | None = None):
        super().__init__()
        self.params = params
        self.gradient_checkpointing = False
        self.transformer = nn.ModuleDict(
            {
                "wte": nn.Embedding(rows, params.n_embd),
                "wpe": nn.Embedding(params.block_size, params.n_embd),
                "drop": nn.Dropout(params.dropout),
                "h": nn.ModuleList(Block(params) for _ in range(params.n_layer)),
                "ln_f": nn.LayerNorm(params.n_embd),
            }
        )
        if multiplicity is not None:
            multiplicity = torch.as_tensor(multiplicity).float().log()
        self.register_buffer("log_multiplicity", multiplicity, persistent=False)
        self._initialise()

    @torch.no_grad()
    def _initialise(self) -> None:
        """Normal(0, 0.02); what writes to the residual stream by 1/sqrt(2 n_layer) less."""
        for name, p in self.named_parameters():
            if name.endswith("bias"):
                p.zero_()
            elif ".ln_" in name:
                p.fill_(1.0)
            elif name.endswith("c_proj.weight"):
                p.normal_(0.0, 0.02 / math.sqrt(2 * self.params.n_layer))
            else:
                p.normal_(0.0, 0.02)

    def hidden(self, x: torch.Tensor, cache: Cache | None = None) -> torch.Tensor:
        """Token ids [B, T] to what the head reads, [B, T, C]; an empty cache is filled by the way.

        From there sampling.Decoder goes on, token by token.
        """
        t, T = self.transformer, x.shape[1]
        assert self.params.block_size >= T, "more tokens than the context holds"
        assert not (cache and cache.length), "a cache that holds something is the decoder's"
        x = t.drop(t.wte(x) + t.wpe(torch.arange(T, device=x.device)))
        if cache is None:
            return self._through_blocks(x)
        for layer, block in enumerate(t.h):
            x = block(x, cache, layer)
        cache.length += T
        return t.ln_f(x)

    def _through_blocks(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.transformer.h:
            if self.gradient_checkpointing and self.training:
                x = checkpoint(block, x, use_reentrant=False)
            else:
                x = block(x)
        return self.transformer.ln_f(x)

    def compile(self, **options) -> None:
        """Compile what is between the embeddings, whose gradient is sums in a fixed order, and the
        head."""
        self._through_blocks = torch.compile(self._through_blocks, **options)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Token ids [B, T] to logits [B, T, V]."""
        assert self.log_multiplicity is None, "a row that several tokens share has no logit of each"
        return F.linear(self.hidden(x), self.transformer.wte.weight)

    def loss(
        self, x: torch.Tensor, y: torch.Tensor, scale: torch.Tensor | float = 1.0
    ) -> torch.Tensor:
        """Mean cross-entropy in nats of y [B, T] given x [B, T]. For training: `backward` on it,
        as it is, gives scale times its gradient."""
        hidden, weight, bias = self.hidden(x), self.transformer.wte.weight, self.log_multiplicity
        hidden, y = hidden.flatten(0, 1), y.flatten()
        loss = cross_entropy.linear_cross_entropy(hidden, weight, bias, y, scale)
        return loss if bias is None else loss + bias[y].mean()

    def token_losses(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        """Cross-entropy in nats [B, T] of each of y [B, T] given x [B, T]."""
        weight, bias = self.transformer.wte.weight, self.log_multiplicity
        losses = cross_entropy.token_losses(self.hidden(x).flatten(0, 1), weight, bias, y.flatten())
        return losses.view_as(y) if bias is None else losses.view_as(y) + bias[y]


def parameter_counts(model: GPT) -> dict[str, int]:
    """Trained numbers by part; the head adds none, it is the token embedding."""
    parts = {
        "token embedding and head": ".wte.",
        "position embedding": ".wpe.",
        "attention": ".attn.",
        "MLP": ".mlp.",
        "layer norms": ".ln_",
    }
    report = {
        part: sum(p.numel() for name, p in model.named_parameters() if key in name)
        for part, key in parts.items()
    }
    return report | {"total": sum(p.numel() for p in model.parameters())}
