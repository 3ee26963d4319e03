"""The `evaluate` section of params.yaml, and the input of the model in MLflow."""

from dataclasses import dataclass
from typing import Annotated

# The input of the model in MLflow: a table with this column, and params with these defaults.
COLUMN = "prompt"
PARAMS = {"tokens": 100, "temperature": 0.8, "top_k": 0, "top_p": 0.95, "seed": -1}


@dataclass(frozen=True, kw_only=True)
class EvaluateParams:
    stride: Annotated[int, ">= 1"]  # step of the sliding window in tokens; at most model.block_size
    whole_training_text: bool  # train_loss: of all training tokens, or of as many as in validation
    prompts: list[str]  # the texts that samples start with
    temperatures: Annotated[list[float], ">= 0"]  # one sample per prompt and temperature; 0: greedy
    sample_tokens: Annotated[int, ">= 1"]  # tokens per sample, without the prompt
    top_k: Annotated[int | None, ">= 1"]  # sample from the k most likely tokens; null: from all
    top_p: Annotated[float | None, "> 0, <= 1"]  # ... whose probabilities add up to p
    seed: Annotated[int, ">= 0"]  # for sampling

    def __post_init__(self) -> None:
        if not all(self.prompts):
            raise ValueError("prompts: a prompt is empty; use '\\n' to start without a prompt")
