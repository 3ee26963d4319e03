"""The model that MLflow serves: it maps prompts to the texts that follow them.

MLflow stores this file and the `folio` package with each logged model and runs this file to load
the model; nothing is pickled. Requests are limited, because a server may accept them from anyone.
"""

import secrets
from pathlib import Path
from typing import Any

import torch
from mlflow.exceptions import MlflowException
from mlflow.models import set_model
from mlflow.pyfunc.model import PythonModel

from folio.gpt import huggingface
from folio.inference import generation
from folio.tokens import tokenizer

# The limits of a request.
MAX_PROMPTS = 64
MAX_CHARACTERS = 10_000  # per prompt
MAX_TOKENS = 1_000  # generated for each prompt


class TextGenerator(PythonModel):
    """Generates text. The params of a prediction:

    tokens: the number of tokens to generate.
    temperature: 0 always selects the most probable token.
    top_k: sample from the k most probable tokens; 0 is no limit.
    top_p: sample from the most probable tokens with this total probability; 1 is no limit.
    seed: -1 is a different random seed for each request.
    """

    # MLflow would warn that `predict` has no type hints. With type hints, it would derive from them
    # a signature without params.
    _skip_type_hint_validation = True

    def load_context(self, context: Any) -> None:
        """Load the model from the Hugging Face folder among the artifacts."""
        self.model = huggingface.load(Path(context.artifacts["gpt2"]))

    def predict(self, context, model_input, params=None):
        """Generate a text for each prompt, in their order. Raises MlflowException for an invalid
        request."""
        prompts, p = _texts(model_input), params or {}
        tokens = _in_range(p, "tokens", 1, MAX_TOKENS)
        temperature = _in_range(p, "temperature", 0, 100)
        top_k = _in_range(p, "top_k", 0, tokenizer.VOCAB_SIZE)
        top_p = _in_range(p, "top_p", 0, 1)
        seed = _in_range(p, "seed", -1, 2**63 - 1 - MAX_PROMPTS)
        if top_p == 0:
            raise _invalid("params: top_p is 0, which leaves no token; 1 is no limit")
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
    """The prompts in a list, an array or the first column of a pandas DataFrame."""
    if hasattr(model_input, "iloc"):
        model_input = model_input.iloc[:, 0]
    texts = [str(text) for text in model_input]
    if not 1 <= len(texts) <= MAX_PROMPTS:
        raise _invalid(f"inputs: {len(texts)} prompts; a request must have 1 to {MAX_PROMPTS}")
    for text in texts:
        if not 1 <= len(text) <= MAX_CHARACTERS:
            raise _invalid(
                f"inputs: a prompt of {len(text):,} characters; it must have 1 to"
                f" {MAX_CHARACTERS:,}"
            )
    return texts


def _in_range(params: dict[str, Any], name: str, low: float, high: float) -> Any:
    if not low <= params[name] <= high:
        raise _invalid(f"params: {name} is {params[name]}; it must be {low} to {high}")
    return params[name]


def _invalid(message: str) -> MlflowException:
    return MlflowException.invalid_parameter_value(message)  # MLflow's server responds with 400


set_model(TextGenerator())
