"""The section `train` of params.yaml."""

from dataclasses import dataclass
from typing import Annotated, Literal

from folio.device import Precision
from folio.training.pretrained import RANDOM

Compile = Literal["auto", "always", "never"]


@dataclass(frozen=True, kw_only=True)
class TrainParams:
    init_from: str  # weights to start from: random, or a GPT-2 folder in data/pretrained
    seed: Annotated[int, ">= 0"]  # of the weights, the order of the data and dropout
    steps: Annotated[int, ">= 1"]  # optimizer updates at most
    batch_size: Annotated[int, ">= 1"]  # windows of block_size tokens in a micro-batch
    accumulation: Annotated[int, ">= 1"]  # micro-batches an update
    precision: Precision  # auto: bf16 on a GPU that has it, else fp32
    deterministic: bool  # the same bits from every run; on a GPU a long context costs speed
    compile: Compile  # make kernels for the model; auto: if the training is a long one
    gradient_checkpointing: bool  # compute activations twice, to hold fewer of them
    tie_unseen_tokens: bool  # one embedding row for all tokens that never occur in training
    learning_rate: Annotated[float, "> 0"]  # at its peak
    min_learning_rate: Annotated[float, ">= 0"]  # at the end of the cosine
    warmup_steps: Annotated[int, ">= 0"]  # updates of linear warm-up
    weight_decay: Annotated[float, ">= 0"]  # of matrices and embeddings alone
    beta1: Annotated[float, ">= 0, < 1"]  # AdamW: decay of the mean gradient
    beta2: Annotated[float, ">= 0, < 1"]  # AdamW: decay of the mean squared gradient
    grad_clip: Annotated[float, "> 0"]  # the gradient's norm at most
    eval_interval: Annotated[int, ">= 1"]  # updates between evaluations on the held-out text
    patience: Annotated[int | None, ">= 1"]  # evaluations without a better one; null: never stop

    def __post_init__(self):
        if self.warmup_steps >= self.steps:
            raise ValueError(f"warmup_steps: {self.warmup_steps} leaves no step of {self.steps}")
        if self.min_learning_rate > self.learning_rate:
            raise ValueError(f"min_learning_rate: is above learning_rate {self.learning_rate}")
        if self.tie_unseen_tokens and self.init_from != RANDOM:
            raise ValueError(
                "tie_unseen_tokens: set it to false with init_from, whose model has a row of its"
                " own for each token"
            )
