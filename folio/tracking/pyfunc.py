"""The model that MLflow serves: it maps each prompt to a continuation.

MLflow stores this file and the `folio` package with each logged model, and runs this file to load
the model; nothing is pickled. Requests are limited, because a server may accept them from anyone.
"""

import contextlib
import secrets
import threading
from pathlib import Path
from typing import Any

import torch
from mlflow.exceptions import MlflowException
from mlflow.models import set_model
from mlflow.pyfunc.model import PythonModel

from folio.device import resolve_device
from folio.errors import UserError
from folio.gpt import huggingface
from folio.gpt.model import GPT
from folio.inference import generation
from folio.inference.params import COLUMN, PARAMS
from folio.inference.precision import in_precision
from folio.inference.prompt import encode_prompt
from folio.tokens import tokenizer

# The limits of a request.
MAX_PROMPTS = 64
MAX_CHARACTERS = 10_000  # per prompt
MAX_TOKENS = 1_000  # generated for each prompt

# MLflow's server answers each request in a thread of its own, but only one thread at a time can
# capture a CUDA graph.
_GPU = threading.Lock()


class TextGenerator(PythonModel):
    """Generates text. The params of a prediction:

    tokens: the number of tokens to generate.
    temperature: 0 always selects the most likely token.
    top_k: sample from the k most likely tokens; 0 means no limit.
    top_p: sample from the most likely tokens with this total probability; 1 means no limit.
    seed: -1 means a different random seed for each request.
    """

    # MLflow would warn that `predict` has no type hints. With type hints, it would use them to
    # derive a signature without params.
    _skip_type_hint_validation = True

    def load_context(self, context: Any) -> None:
        """Load the model from the Hugging Face folder among the artifacts, onto the GPU if there
        is one."""
        model = huggingface.load(Path(context.artifacts["gpt2"]), resolve_device("auto"))
        self.model = in_precision(model, "auto")

    def predict(self, context, model_input, params=None):
        """Generate a text for each prompt, in order. Raises MlflowException for an invalid
        request."""
        p = PARAMS | (params or {})
        if unknown := p.keys() - PARAMS:
            raise _invalid(f"params: {min(unknown)[:100]!r} is unknown")
        texts = _texts(model_input)
        tokens = _in_range(p, "tokens", int, 1, MAX_TOKENS)
        temperature = _in_range(p, "temperature", float, 0, 100)
        top_k = _in_range(p, "top_k", int, 0, tokenizer.VOCAB_SIZE)
        top_p = _in_range(p, "top_p", float, 0, 1)
        seed = _in_range(p, "seed", int, -1, 2**63 - 1 - MAX_PROMPTS)
        if top_p == 0:
            raise _invalid("params: top_p is 0, which excludes every token; 1 means no limit")
        seed = secrets.randbits(48) if seed < 0 else seed
        prompts = [_encode(self.model, text) for text in texts]
        is_cuda = self.model.transformer.wte.weight.is_cuda
        lock = _GPU if is_cuda else contextlib.nullcontext()
        try:
            with lock:
                return [
                    tokenizer.decode(
                        generation.generate(
                            self.model,
                            prompt,
                            tokens,
                            temperature,
                            top_k or None,
                            None if top_p == 1 else top_p,
                            torch.Generator().manual_seed(seed + number),
                        )
                    )
                    for number, prompt in enumerate(prompts)
                ]
        except UserError as problem:  # of the model, not of the request
            raise MlflowException(str(problem)) from None


def _texts(model_input: Any) -> list[str]:
    """The prompts in a string, a list, a one-dimensional array or a table.

    A table is a pandas DataFrame or a dict of columns. Its only column must be called "prompt" or
    have no name.
    """
    if isinstance(model_input, dict) or hasattr(model_input, "columns"):
        names = list(model_input)
        if len(names) != 1 or (isinstance(names[0], str) and names[0] != COLUMN):
            raise _invalid(
                f"inputs: the columns are {str(names)[:100]}; there must be a single column named"
                f" {COLUMN}"
            )
        model_input = model_input[names[0]]
    if hasattr(model_input, "tolist"):
        model_input = model_input.tolist()  # an array
    texts = [model_input] if isinstance(model_input, str) else model_input
    if not isinstance(texts, list | tuple):
        raise _invalid(f"inputs: expected a list of prompts, not {type(texts).__name__}")
    if not 1 <= len(texts) <= MAX_PROMPTS:
        raise _invalid(f"inputs: {len(texts)} prompts; a request must have 1 to {MAX_PROMPTS}")
    for text in texts:
        if not isinstance(text, str):
            raise _invalid(f"inputs: a prompt has type {type(text).__name__}; it must be a string")
        if not 1 <= len(text) <= MAX_CHARACTERS:
            raise _invalid(
                f"inputs: a prompt has {len(text):,} characters; it must have 1 to"
                f" {MAX_CHARACTERS:,}"
            )
    return list(texts)


def _encode(model: GPT, text: str) -> list[int]:
    try:
        return encode_prompt(model, text)
    except UserError as problem:
        raise _invalid(f"inputs: {problem}") from None


def _in_range(params: dict[str, Any], name: str, kind: type, low: float, high: float) -> Any:
    value = params[name]
    is_number = isinstance(value, int | kind) and not isinstance(value, bool)
    if not is_number or not low <= value <= high:  # NaN fails the comparisons
        value = value if is_number else f"of type {type(value).__name__}"
        expected = "a whole number" if kind is int else "a number"
        raise _invalid(
            f"params: {name} is {str(value)[:50]}; it must be {expected} between {low} and {high}"
        )
    return value


def _invalid(message: str) -> MlflowException:
    return MlflowException.invalid_parameter_value(message)  # MLflow's server responds with 400


set_model(TextGenerator())
