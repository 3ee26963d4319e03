"""The `train` section of params.yaml."""

from dataclasses import dataclass
from typing import Annotated, Literal

from folio.errors import UserError

RANDOM = "random"  # init_from: no folder, but random weights
NONE = "none"  # distill_from: no folder


@dataclass(frozen=True, kw_only=True)
class TrainParams:
    init_from: str  # initial weights: random, or a GPT-2 folder in data/pretrained
    seed: Annotated[int, ">= 0"]  # for the initial weights, the batches and dropout
    steps: Annotated[int, ">= 1"]  # maximum number of optimizer steps
    batch_size: Annotated[int, ">= 1"]  # windows of block_size tokens per micro-batch
    accumulation: Annotated[int, ">= 1"]  # micro-batches per optimizer step
    precision: Literal["auto", "bf16", "fp16", "fp32"]  # auto: bf16 on a GPU with bf16, else fp32
    fp8_head: bool  # the head's products in fp8 (fused kernels, from Ada and Hopper on)
    deterministic: bool  # bitwise reproducible; slower on a GPU with a long context
    compile: Literal["auto", "always", "never"]  # fused kernels on a GPU, and for models that they
    # do not support torch.compile (auto: for long runs); never: PyTorch's own kernels
    parallel: Literal["auto", "none", "ddp", "fsdp"]  # with several processes: see below
    gradient_checkpointing: bool  # recompute activations in the backward pass to save memory
    tie_unseen_tokens: bool  # one embedding row for all tokens that never occur in training
    unseen_probability: Annotated[float, ">= 0, < 1"]  # of their shared row, as a target; without
    # tie_unseen_tokens, there is no such row, and this has no effect
    distill_from: str  # teachers: none, or a folder of GPT-2 folders in data/pretrained
    distill_weight: Annotated[float, ">= 0, <= 1"]  # share of the teachers in the targets
    input_noise: Annotated[float, ">= 0, <= 1"]  # share of input tokens replaced at random
    optimizer: Literal["adamw", "muon"]  # muon: Muon for the blocks' matrices, AdamW for the rest
    factored_embedding: bool  # tokens that differ in case or leading space learn together
    learning_rate: Annotated[float, "> 0"]  # peak value, after warm-up
    min_learning_rate: Annotated[float, ">= 0"]  # at the end of the cosine decay
    warmup_steps: Annotated[int, ">= 0"]  # steps of linear warm-up
    weight_decay: Annotated[float, ">= 0"]  # for matrices and embeddings only
    muon_learning_rate: Annotated[float, "> 0"]  # peak value for Muon's matrices
    muon_weight_decay: Annotated[float, ">= 0"]  # for Muon's matrices
    beta1: Annotated[float, ">= 0, < 1"]  # AdamW: decay of the mean gradient
    beta2: Annotated[float, ">= 0, < 1"]  # AdamW: decay of the mean squared gradient
    grad_clip: Annotated[float, "> 0"]  # maximum gradient norm
    eval_interval: Annotated[int, ">= 1"]  # steps between evaluations on the validation text
    patience: Annotated[int | None, ">= 1"]  # evaluations without improvement; null: never
    keep: Literal["best", "last"]  # the weights for models/gpt2: best evaluation, or last step
    overfit_batches: Annotated[int | None, ">= 1"]  # only the first N steps' windows; null: all

    def __post_init__(self):
        if self.warmup_steps >= self.steps:
            raise ValueError(
                f"warmup_steps: {self.warmup_steps} is not less than steps {self.steps}: lower it"
            )
        if self.min_learning_rate > self.learning_rate:
            raise ValueError(
                f"min_learning_rate: {self.min_learning_rate} is above learning_rate"
                f" {self.learning_rate}"
            )
        if self.tie_unseen_tokens and self.init_from != RANDOM:
            raise ValueError(
                "tie_unseen_tokens: must be false with init_from, because pretrained weights have a"
                " separate row for each token"
            )
        if self.parallel == "fsdp" and (self.optimizer == "muon" or self.factored_embedding):
            raise ValueError(
                "parallel: must be auto, none or ddp with optimizer: muon or factored_embedding,"
                " which need whole matrices"
            )
        if self.fp8_head and (self.precision == "fp32" or self.compile == "never"):
            raise ValueError(
                "fp8_head: must be false with precision: fp32 or compile: never, because it is part"
                " of the fused kernels for bf16 and fp16"
            )
        if self.fp8_head and self.parallel == "fsdp":
            raise ValueError(
                "fp8_head: must be false with parallel: fsdp, because it needs whole weights"
            )
        if self.keep == "last" and self.patience is not None:
            raise ValueError(
                "patience: must be empty with keep: last, which keeps the weights of the last step"
                " of the schedule"
            )

    @property
    def windows(self) -> int:
        """Windows of a step, in all processes together."""
        return self.batch_size * self.accumulation

    def check_processes(self, count: int) -> None:
        """Raise UserError if so many processes cannot train together.

        Each must have at least one window for each of its micro-batches.
        """
        if count > 1 and self.parallel == "none":
            raise UserError(
                f"train.parallel is none, but {count} processes were requested: set it to auto, ddp"
                " or fsdp, or start one"
            )
        if self.windows // count < micro_batches_each(self.windows, self.batch_size, count):
            raise UserError(
                f"{count} processes cannot share the {self.windows} windows of a step"
                f" (train.batch_size x train.accumulation): make train.accumulation a multiple of"
                f" {count}, or start fewer processes"
            )


def micro_batches_each(windows: int, batch_size: int, processes: int) -> int:
    """The number of micro-batches of each process in a step."""
    largest_share = -(-windows // processes)
    return -(-largest_share // batch_size)
