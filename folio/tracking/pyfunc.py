"""The model as MLflow serves it: prompts in, the text that follows them out.

MLflow keeps this file, and the library beside it, with each logged model, and runs it as it is:
nothing is pickled. What may be asked for is bounded, for a server's strangers.
"""

import secrets
from pathlib import Path
from typing import Any

import mlflow
import torch
from mlflow.exceptions import MlflowException

from folio.gpt import huggingface
from folio.inference import generation
from folio.tokens import tokenizer

PROMPTS, CHARACTERS, TOKENS = 64, 10_000, 1_000  # a request may hold at most


class Text(mlflow.pyfunc.PythonModel):
    """Its params: tokens, temperature (0: the likeliest each time), top_k (0: among all), top_p
    (1: among all), seed (-1: another text each time)."""

    # MLflow asks for hints at each start, and would take them for the signature, without params.
    _skip_type_hint_validation = True

    def load_context(self, context: Any) -> None:
        self.model = huggingface.load(Path(context.artifacts["gpt2"]))

    def predict(self, context, model_input, params=None):
        """The texts, in the order of the prompts. Raises MlflowException for what is too much."""
        prompts, p = _texts(model_input), params or {}
        tokens, temperature = _within(p, "tokens", 1, TOKENS), _within(p, "temperature", 0, 100)
        top_k, top_p = _within(p, "top_k", 0, tokenizer.VOCAB_SIZE), _within(p, "top_p", 0, 1)
        seed = _within(p, "seed", -1, 2**63 - 1 - PROMPTS)
        if top_p == 0:
            raise _refused("top_p: 0 leaves no token; 1 takes all")
        seed = secrets.randbits(48) if seed < 0 else seed
        return [
            tokenizer.decode(
                generation.generate(
                    self.model,
                    tokenizer.encode(prompt).tolist(),
                    tokens,
                    temperature,
                    top_k or None,
                    None if top_p == 1 else top_p,
                    torch.Generator().manual_seed(seed + number),
                )
            )
            for number, prompt in enumerate(prompts)
        ]


def _texts(model_input: Any) -> list[str]:
    """The prompts in a list, a column of a pandas frame or an array."""
    if hasattr(model_input, "iloc"):
        model_input = model_input.iloc[:, 0]
    texts = [str(text) for text in model_input]
    if not 1 <= len(texts) <= PROMPTS:
        raise _refused(f"inputs: {len(texts)} prompts; a request takes 1 to {PROMPTS}")
    for text in texts:
        if not 1 <= len(text) <= CHARACTERS:
            raise _refused(f"inputs: {len(text)} characters; a prompt takes 1 to {CHARACTERS:,}")
    return texts


def _within(params: dict[str, Any], name: str, least: float, most: float) -> Any:
    if not least <= params[name] <= most:
        raise _refused(f"params: {name} is {params[name]}; it takes {least} to {most}")
    return params[name]


def _refused(why: str) -> MlflowException:
    return MlflowException.invalid_parameter_value(why)  # a server answers 400


mlflow.models.set_model(Text())
