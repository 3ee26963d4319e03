"""The `prepare` section of params.yaml."""

from dataclasses import dataclass
from typing import Annotated


@dataclass(frozen=True, kw_only=True)
class PrepareParams:
    corpus: str  # tinyshakespeare, shakespeare, or a file or folder under data/raw
    text_column: str  # the key in .jsonl files, and the column in .parquet files, with the text
    validation_fraction: Annotated[float, "> 0, < 1"]  # taken from the end of your own text; the
    # named corpora ignore it: they are all validated on the last tenth of tinyshakespeare
    training_fraction: Annotated[float, "> 0, <= 1"]  # the share of the training text's tokens,
    # from its end, that is used: would more text help?
    segmentations: Annotated[int, ">= 0, <= 99"]  # of the training text, in addition to GPT-2's
    bpe_dropout: Annotated[float, ">= 0, < 1"]  # in these, the probability that a merge is dropped
    report_batch_size: Annotated[int, ">= 1"]  # windows per batch, only for batches_per_epoch
    report_block_size: Annotated[int, ">= 1"]  # tokens per window, only for batches_per_epoch
