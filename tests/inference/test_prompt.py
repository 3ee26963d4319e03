"""Prompts as token ids."""

import pytest

from folio.errors import UserError
from folio.gpt.model import GPT, ModelParams
from folio.inference.prompt import encode_prompt
from folio.tokens import tokenizer

SIZES = ModelParams(n_layer=1, n_head=1, n_embd=8, block_size=8, dropout=0.0)


def test_encode_prompt_gives_the_ids_of_gpt2():
    assert encode_prompt(GPT(SIZES, 50_257), "To be") == tokenizer.encode("To be").tolist()


def test_encode_prompt_rejects_tokens_outside_the_vocabulary():
    with pytest.raises(UserError, match="outside this model's vocabulary of 100"):
        encode_prompt(GPT(SIZES, 100), "To be")
