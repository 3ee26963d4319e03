"""The `model` section of params.yaml."""

from dataclasses import dataclass
from typing import Annotated


@dataclass(frozen=True, kw_only=True)
class ModelParams:
    n_layer: Annotated[int, ">= 1"]  # number of blocks
    n_head: Annotated[int, ">= 1"]  # attention heads per block
    n_embd: Annotated[int, ">= 1"]  # channels; a multiple of n_head
    block_size: Annotated[int, ">= 2"]  # context length in tokens
    dropout: Annotated[float, ">= 0, < 1"]  # after embeddings, in attention and after projections

    def __post_init__(self) -> None:
        if self.n_embd % self.n_head:
            nearest = max(1, round(self.n_embd / self.n_head)) * self.n_head
            raise ValueError(
                f"n_embd: {self.n_embd} is not divisible by n_head {self.n_head}; try {nearest}"
            )
