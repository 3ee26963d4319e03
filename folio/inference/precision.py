"""The precision in which a model generates text."""

import copy

from folio.device import DTYPES, resolve_precision
from folio.gpt.model import GPT


def in_precision(model: GPT, precision: str) -> GPT:
    """The model with its weights in a precision, to generate text with.

    precision: bf16, fp16, fp32, or auto: bf16 on a GPU with native bf16 support, otherwise fp32.
    Generating a token takes as long as reading the weights from memory, so half the bytes are twice
    as fast. Returns the model itself if its weights are in that precision already, otherwise a
    copy: losses and probabilities are to be computed with the original, in fp32.
    """
    weight = model.transformer.wte.weight
    dtype = DTYPES[resolve_precision(precision, weight.device)]
    return model if weight.dtype == dtype else copy.deepcopy(model).to(dtype)
