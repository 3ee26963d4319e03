"""The `evaluate` section of params.yaml."""

from dataclasses import dataclass
from typing import Annotated


@dataclass(frozen=True, kw_only=True)
class EvaluateParams:
    stride: Annotated[int, ">= 1"]  # step of the sliding window, tokens; at most model.block_size
    prompts: list[str]  # the texts that samples start with
    temperatures: Annotated[list[float], ">= 0"]  # one sample per prompt and temperature; 0: greedy
    sample_tokens: Annotated[int, ">= 1"]  # tokens per sample, without the prompt
    top_k: Annotated[int | None, ">= 1"]  # sample from the k most likely tokens; null: from all
    top_p: Annotated[float | None, "> 0, <= 1"]  # ... from the most likely tokens that sum to p
    seed: Annotated[int, ">= 0"]  # for sampling

    def __post_init__(self) -> None:
        if not all(self.prompts):
            raise ValueError("prompts: a prompt is empty; use '\\n' to start without a prompt")
