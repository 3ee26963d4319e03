"""Save and load GPT-2 as a Hugging Face folder: safetensors, configs and tokenizer files."""

import json
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.overrides import TorchFunctionMode

from folio.errors import UserError
from folio.files import naming
from folio.gpt import model_files, safetensors_files, weight_files
from folio.gpt.model import GPT, ModelParams
from folio.gpt.model_files import MissingModelError, ModelFiles
from folio.gpt.safetensors_files import FLOATS, StoredTensor
from folio.gpt.weight_files import HINT, shorten
from folio.tokens import tokenizer

# In transformers these are Conv1D layers, whose weight is [in, out], the transpose of a Linear's.
_TRANSPOSED = ("c_attn.weight", "c_proj.weight", "c_fc.weight")
_EMBEDDING = "transformer.wte.weight"

_MAX_CONFIG = 1 << 20  # bytes

# The values in config.json of GPT-2's arithmetic. A missing key defaults to its value here.
_GPT2 = {
    "model_type": "gpt2",
    "activation_function": "gelu_new",
    "layer_norm_epsilon": 1e-5,
    "scale_attn_weights": True,
    "scale_attn_by_inverse_layer_idx": False,
    "add_cross_attention": False,
    "tie_word_embeddings": True,
}

_END_OF_TEXT = tokenizer.VOCAB_SIZE - 1

# How transformers generates text by default: like `python -m folio sample`, but only
# until the context is full, because it cannot slide the context along a longer text.
_GENERATION = {
    "bos_token_id": _END_OF_TEXT,
    "eos_token_id": _END_OF_TEXT,
    "pad_token_id": _END_OF_TEXT,
    "do_sample": True,
    "temperature": 0.8,
    "top_k": 0,  # no limit; the default is 50
    "top_p": 0.95,
}


def save(
    model: GPT,
    folder: Path,
    row: np.ndarray | None = None,
    weights: Iterable[tuple[str, torch.Tensor]] | None = None,
) -> None:
    """Write a folder that transformers' GPT2LMHeadModel and AutoTokenizer can open.

    `row` [vocabulary size] is the embedding row of each token, for a model in which tokens share
    rows. `weights` are the names and values to write instead of the model's own: each name of its
    state dict once, in any order. They are consumed one by one, so they can be gathered one by one
    from the processes that share a model, and to the end even after a failure, because those
    processes take part. Weights of more than 5 GB are split into several files.

    The folder is written under a temporary name and then renamed. A failure raises OSError and
    leaves the previous folder untouched.
    """
    state = model.state_dict()
    weights = iter(state.items() if weights is None else weights)
    shapes = {
        name: tuple(reversed(tensor.shape) if name.endswith(_TRANSPOSED) else tensor.shape)
        for name, tensor in state.items()
    }
    if row is not None:
        shapes[_EMBEDDING] = (len(row), model.params.n_embd)
    temporary = folder.with_name(f".{folder.name}.partial")
    try:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        stored = ((name, _stored(name, tensor, row)) for name, tensor in weights)
        with naming(folder):
            safetensors_files.write(temporary, shapes, stored)
            config = _config(model.params, shapes[_EMBEDDING][0])
            generation = _GENERATION | {"max_length": model.params.block_size}
            for name, content in (("config.json", config), ("generation_config.json", generation)):
                (temporary / name).write_text(json.dumps(content, indent=2) + "\n")
            tokenizer.save(temporary, model.params.block_size)
        if folder.exists():
            previous = folder.with_name(f".{folder.name}.previous")
            shutil.rmtree(previous, ignore_errors=True)
            folder.rename(previous)
            temporary.rename(folder)
            shutil.rmtree(previous)
        else:
            temporary.rename(folder)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        for _ in weights:
            pass
        raise


def _stored(name: str, tensor: torch.Tensor, row: np.ndarray | None) -> torch.Tensor:
    """A weight as the folder contains it."""
    if row is not None and name == _EMBEDDING:
        tensor = tensor[torch.from_numpy(row.astype(np.int64)).to(tensor.device)]
    return tensor.T if name.endswith(_TRANSPOSED) else tensor


def load(folder: Path, device: torch.device | str = "cpu") -> GPT:
    """Load a GPT-2 folder written by Folio or transformers. The model is in fp32 and eval mode.

    Raises UserError if the folder is missing or damaged, or does not contain a GPT-2 model in
    safetensors format, or if a weight is NaN or infinite. The folder may come from an untrusted
    source: no code in it is run, and the sizes in config.json are compared with those in the
    weight files before a model is built. It may also be replaced during the load: see model_files.
    """
    return model_files.read(folder, _load).to(device).eval()


def read_sizes(folder: Path) -> tuple[ModelParams, int]:
    """Return the sizes of the model in a GPT-2 folder, and how many tokens it has.

    Reads config.json and the headers of the weight files. Raises UserError like `load`, except for
    weights that are NaN or infinite.
    """
    model, _ = model_files.read(folder, _describe)
    return model.params, model.transformer.wte.num_embeddings


def _load(files: ModelFiles) -> GPT:
    model, tensors = _describe(files)
    state = {}
    for name in tensors:
        tensor = tensors[name].read()
        state[name] = (tensor.t() if name.endswith(_TRANSPOSED) else tensor).float().contiguous()
    model.load_state_dict(state, assign=True)
    _check_finite(model, files.folder)
    return model


def _describe(files: ModelFiles) -> tuple[GPT, dict[str, StoredTensor]]:
    """The model without values, on the "meta" device, and its weights, which are not read yet."""
    folder, config = files.folder, _read_config(files)
    tensors = _by_our_names(safetensors_files.stored_tensors(files), folder)
    _check_sizes(tensors, folder, config)
    try:
        params = ModelParams(
            n_layer=config["n_layer"],
            n_head=config["n_head"],
            n_embd=config["n_embd"],
            block_size=config["n_positions"],
            dropout=float(config.get("resid_pdrop", 0.1)),
        )
    except ValueError as error:
        raise UserError(f"{folder / 'config.json'}: {error}") from None
    with torch.device("meta"), _SkipRandomWeights():
        model = GPT(params, config["vocab_size"])
    for name, parameter in model.named_parameters():
        expected = list(parameter.T.shape if name.endswith(_TRANSPOSED) else parameter.shape)
        if name not in tensors:
            raise _mismatch(folder, f"{name} is missing")
        if tensors[name].shape != expected:
            raise _mismatch(folder, f"{name} is {shorten(tensors[name].shape)}, not {expected}")
    return model, tensors


def weights_sha256(folder: Path) -> str:
    """The SHA-256 of a folder's weights: of model.safetensors, or of all shards and their index.

    Raises UserError if the folder has no weights, or if they cannot be read.
    """
    return weight_files.sha256(folder)


@torch.no_grad()
def _check_finite(model: GPT, folder: Path) -> None:
    """Raise UserError if a weight is NaN or infinite: such a model would generate nonsense."""
    for name, parameter in model.named_parameters():
        if not torch.stack(parameter.aminmax()).isfinite().all():  # NaN spreads to both
            raise UserError(f"{folder}: {name} has values that are NaN or infinite: {HINT}")


class _SkipRandomWeights(TorchFunctionMode):
    """Skips `normal_` for tensors on the "meta" device, where it has no effect.

    PyTorch would import its compiler just to find that out, which takes 1.4 s.
    """

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if func.__name__ == "normal_":
            return args[0] if args else kwargs["tensor"]
        return func(*args, **kwargs)


def _config(p: ModelParams, vocab_size: int) -> dict[str, Any]:
    return _GPT2 | {
        "architectures": ["GPT2LMHeadModel"],
        "vocab_size": vocab_size,
        "n_positions": p.block_size,
        "n_ctx": p.block_size,  # for llama.cpp
        "n_embd": p.n_embd,
        "n_layer": p.n_layer,
        "n_head": p.n_head,
        "n_inner": None,
        "embd_pdrop": p.dropout,
        "attn_pdrop": p.dropout,
        "resid_pdrop": p.dropout,
        "initializer_range": 0.02,
        "bos_token_id": _END_OF_TEXT,
        "eos_token_id": _END_OF_TEXT,
        "dtype": "float32",
    }


def _read_config(files: ModelFiles) -> dict[str, Any]:
    """The content of config.json. Raises UserError unless it describes a GPT-2 model."""
    path = files.folder / "config.json"
    try:
        config = json.loads(files.read("config.json", _MAX_CONFIG))
        if not isinstance(config, dict):
            raise ValueError
    except FileNotFoundError:
        raise MissingModelError(files.folder) from None
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror or error}") from None
    except (ValueError, RecursionError):
        raise UserError(f"{path} cannot be read as JSON: {HINT}") from None
    for key, value in _GPT2.items():
        if config.get(key, value) != value:
            raise UserError(
                f"{path}: {key} is {shorten(config[key])}; "
                f"Folio only supports GPT-2, where it is {value!r}"
            )
    for key in ("n_layer", "n_head", "n_embd", "n_positions", "vocab_size"):
        size = config.get(key)
        if type(size) is not int or not 0 < size < 1 << 63:
            raise UserError(f"{path}: {key} is {shorten(size)}; it must be an int from 1 to 2**63")
    if config.get("n_inner") not in (None, 4 * config["n_embd"]):
        raise UserError(f"{path}: n_inner is {shorten(config['n_inner'])}; it must be 4 x n_embd")
    dropout = config.get("resid_pdrop", 0.1)
    if type(dropout) not in (int, float) or not 0 <= dropout < 1:
        raise UserError(f"{path}: resid_pdrop is {shorten(dropout)}; it must be >= 0 and < 1")
    return config


def _by_our_names(tensors: dict[str, StoredTensor], folder: Path) -> dict[str, StoredTensor]:
    """The stored tensors by the names of our parameters; OpenAI's names have no prefix."""
    found: dict[str, StoredTensor] = {}
    for stored_name, tensor in tensors.items():
        prefix = "" if stored_name.startswith(("transformer.", "lm_head.")) else "transformer."
        name = prefix + stored_name
        # Not parameters: a copy of the tied head, and causal masks, which older files contain.
        if name != "lm_head.weight" and not name.endswith((".attn.bias", ".attn.masked_bias")):
            if name in found:
                raise _mismatch(folder, f"{shorten(stored_name)} occurs twice")
            if tensor.dtype not in FLOATS:
                reason = f"{shorten(stored_name)} has dtype {shorten(tensor.dtype)}, not a float"
                raise _mismatch(folder, reason)
            found[name] = tensor
    return found


def _check_sizes(tensors: dict[str, StoredTensor], folder: Path, config: dict[str, Any]) -> None:
    """Raise UserError if the sizes in the config are not those of the weights.

    This ensures that a model built from the config is no larger than the files.
    """
    for name, rows in (("wte", "vocab_size"), ("wpe", "n_positions")):
        tensor = tensors.get(f"transformer.{name}.weight")
        found, expected = tensor and tensor.shape, [config[rows], config["n_embd"]]
        if found != expected:
            reason = f"{name}.weight is {shorten(found)}, not {shorten(expected)}"
            raise _mismatch(folder, reason)
    number = 4 + 12 * config["n_layer"]  # two embeddings, ln_f's weight and bias; 12 per block
    if len(tensors) != number:
        raise _mismatch(folder, f"{len(tensors)} tensors instead of {shorten(number)}")


def _mismatch(folder: Path, reason: str) -> UserError:
    return UserError(f"{folder}: its weights do not match config.json ({reason}): {HINT}")
