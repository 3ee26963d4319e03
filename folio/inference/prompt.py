"""Prompts as token ids."""

from folio.errors import UserError
from folio.gpt.model import GPT
from folio.tokens import tokenizer


def encode_prompt(model: GPT, prompt: str) -> list[int]:
    """The token ids of a prompt. Raises UserError if the model's vocabulary is too small."""
    ids, size = tokenizer.encode(prompt).tolist(), model.transformer.wte.num_embeddings
    if max(ids) >= size:
        raise UserError(
            f"the prompt has tokens outside this model's vocabulary of {size:,}: the model was"
            " trained with a different tokenizer"
        )
    return ids
