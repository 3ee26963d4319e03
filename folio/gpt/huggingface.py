"""Save and load GPT-2 as a Hugging Face folder: safetensors, config.json, tokenizer files."""

import json
import reprlib
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open
from torch.overrides import TorchFunctionMode

from folio import files
from folio.errors import UserError
from folio.gpt.model import GPT, ModelParams
from folio.tokens import tokenizer

# In transformers these are Conv1D layers, whose weight is [in, out], the transpose of a Linear's.
_TRANSPOSED = ("c_attn.weight", "c_proj.weight", "c_fc.weight")

_FLOAT_DTYPES = ("F64", "F32", "F16", "BF16")  # as in the header of a safetensors file

_HINT = "download the folder or save the model again"

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


def save(model: GPT, folder: Path, row: np.ndarray | None = None) -> None:
    """Write a folder that transformers' GPT2LMHeadModel and AutoTokenizer can open.

    `row` [vocabulary size] is the embedding row of each token, for a model in which tokens share
    rows. The folder is written under another name and then renamed. A failure raises OSError and
    leaves the previous folder as it was.
    """
    tensors = {}
    for name, tensor in model.state_dict().items():
        if row is not None and name == "transformer.wte.weight":
            tensor = tensor[torch.from_numpy(row.astype(np.int64)).to(tensor.device)]
        tensor = tensor.T if name.endswith(_TRANSPOSED) else tensor
        tensors[name] = tensor.float().cpu().contiguous()
    temporary = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        weights = safetensors.torch.save(tensors, {"format": "pt"})
        (temporary / "model.safetensors").write_bytes(weights)
        config = _config(model.params, len(tensors["transformer.wte.weight"]))
        (temporary / "config.json").write_text(json.dumps(config, indent=2) + "\n")
        tokenizer.save(temporary)
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
        raise


def load(folder: Path, device: torch.device | str = "cpu") -> GPT:
    """Load a GPT-2 folder that Folio or transformers wrote. The model is in fp32 and eval mode.

    Raises UserError if the folder is missing or damaged, or is not a GPT-2 in safetensors. The
    folder may come from an untrusted source: no code in it is run, and the sizes in config.json are
    compared with those in model.safetensors before a model is built from them.
    """
    config = _read_config(folder / "config.json")
    weights = _read_weights(folder / "model.safetensors", config)
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
    try:
        model.load_state_dict(weights, assign=True)
    except RuntimeError:
        raise _mismatch(folder, "names or shapes are not GPT-2's") from None
    return model.to(device).eval()


class _SkipRandomWeights(TorchFunctionMode):
    """Skips `normal_` for tensors on the device "meta", where it has no effect.

    To find that out, PyTorch would import its compiler, which takes 1.4 s.
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
        "n_embd": p.n_embd,
        "n_layer": p.n_layer,
        "n_head": p.n_head,
        "n_inner": None,
        "embd_pdrop": p.dropout,
        "attn_pdrop": p.dropout,
        "resid_pdrop": p.dropout,
        "initializer_range": 0.02,
        "bos_token_id": tokenizer.VOCAB_SIZE - 1,
        "eos_token_id": tokenizer.VOCAB_SIZE - 1,
        "dtype": "float32",
    }


def _read_config(path: Path) -> dict[str, Any]:
    """The content of config.json. Raises UserError unless it describes a GPT-2."""
    try:
        config = json.loads(files.read(path, max_bytes=1 << 20))
        if not isinstance(config, dict):
            raise ValueError
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(
            f"there is no model in {path.parent}: `dvc repro train` trains one"
        ) from None
    except (ValueError, RecursionError, OSError):
        raise UserError(f"{path} cannot be read as JSON: {_HINT}") from None
    for key, value in _GPT2.items():
        if config.get(key, value) != value:
            raise UserError(
                f"{path}: {key} is {_shorten(config[key])}; "
                f"Folio reads only GPT-2, in which it is {value!r}"
            )
    for key in ("n_layer", "n_head", "n_embd", "n_positions", "vocab_size"):
        size = config.get(key)
        if type(size) is not int or not 0 < size < 1 << 63:
            raise UserError(f"{path}: {key} is {_shorten(size)}; it must be an int from 1 to 2**63")
    if config.get("n_inner") not in (None, 4 * config["n_embd"]):
        raise UserError(f"{path}: n_inner is {_shorten(config['n_inner'])}; GPT-2's is 4 x n_embd")
    dropout = config.get("resid_pdrop", 0.1)
    if type(dropout) not in (int, float) or not 0 <= dropout < 1:
        raise UserError(f"{path}: resid_pdrop is {_shorten(dropout)}; it must be >= 0 and < 1")
    return config


def _read_weights(path: Path, config: dict[str, Any]) -> dict[str, torch.Tensor]:
    """The state dict of our GPT, from the names and layout of transformers.

    The sizes in the config are compared with the header of the file first. They cannot exceed what
    the file contains, so neither can the model that is built from them.
    """
    try:
        if not path.is_file() and path.exists():
            raise OSError("it is not a regular file")
        with safe_open(path, framework="pt") as file:
            stored_names = _stored_names(file, path.parent)
            _check_header(file, stored_names, path.parent, config)
            state = {}
            for name, stored_name in stored_names.items():
                tensor = file.get_tensor(stored_name)
                tensor = tensor.t() if name.endswith(_TRANSPOSED) else tensor
                state[name] = tensor.float().contiguous()
            return state
    except FileNotFoundError:
        raise UserError(
            f"{path} is missing, and Folio does not read pickled weights:"
            " convert them with transformers' save_pretrained, which writes safetensors"
        ) from None
    except (SafetensorError, OSError) as error:
        reason = repr(str(error)[:150])  # it may quote the file
        raise UserError(f"{path} is damaged ({reason}): {_HINT}") from None


def _stored_names(file: safe_open, folder: Path) -> dict[str, str]:
    """The name in the file of each of our parameters; OpenAI's names have no prefix."""
    names: dict[str, str] = {}
    for stored_name in file.keys():  # noqa: SIM118
        prefix = "" if stored_name.startswith(("transformer.", "lm_head.")) else "transformer."
        name = prefix + stored_name
        # Not parameters: a copy of the tied head, and causal masks, which older files contain.
        if name != "lm_head.weight" and not name.endswith((".attn.bias", ".attn.masked_bias")):
            if name in names:
                raise _mismatch(folder, f"{_shorten(stored_name)} occurs twice")
            names[name] = stored_name
    return names


def _check_header(
    file: safe_open, stored_names: dict[str, str], folder: Path, config: dict[str, Any]
) -> None:
    """Raise UserError unless the tensors' dtypes, number and sizes fit the config."""
    shapes = {}
    for name, stored_name in stored_names.items():
        header = file.get_slice(stored_name)
        if header.get_dtype() not in _FLOAT_DTYPES:
            reason = f"{_shorten(stored_name)} has dtype {header.get_dtype()}, not a float"
            raise _mismatch(folder, reason)
        shapes[name] = header.get_shape()
        if name.endswith(_TRANSPOSED) and len(shapes[name]) != 2:
            raise _mismatch(folder, f"{_shorten(stored_name)} is not a matrix")
    for name, rows in (("wte", "vocab_size"), ("wpe", "n_positions")):
        found, expected = shapes.get(f"transformer.{name}.weight"), [config[rows], config["n_embd"]]
        if found != expected:
            reason = f"{name}.weight is {_shorten(found)}, not {_shorten(expected)}"
            raise _mismatch(folder, reason)
    tensors = 4 + 12 * config["n_layer"]  # two embeddings, ln_f's weight and bias; 12 per block
    if len(stored_names) != tensors:
        raise _mismatch(folder, f"{len(stored_names)} tensors instead of {_shorten(tensors)}")


def _shorten(value: Any) -> str:
    """An untrusted value, shortened to one line. (reprlib alone shows 6 levels of 6 items each.)"""
    return reprlib.repr(value)[:100]


def _mismatch(folder: Path, reason: str) -> UserError:
    return UserError(f"{folder}: model.safetensors does not match config.json ({reason}): {_HINT}")
