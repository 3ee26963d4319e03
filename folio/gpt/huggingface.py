"""GPT-2 as a Hugging Face folder, out and in: safetensors, config.json, tokenizer files."""

import json
import reprlib
import shutil
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

# transformers keeps these four as Conv1D, whose weight is [in, out]: the transpose of a Linear's.
_TRANSPOSED = ("c_attn.weight", "c_proj.weight", "c_fc.weight")

_FLOATS = ("F64", "F32", "F16", "BF16")  # as safetensors' header has them

# What a config.json must say for the arithmetic to be GPT-2's; a key that is not there is right.
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
    """Write a folder that transformers' GPT2LMHeadModel and AutoTokenizer open as it is.

    `row` [vocabulary size] gives each token its row of the embedding, where the model has fewer
    rows than the vocabulary tokens. The folder appears whole or not at all.
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
            former = folder.with_name(f".{folder.name}.former")
            shutil.rmtree(former, ignore_errors=True)
            folder.rename(former)
            temporary.rename(folder)
            shutil.rmtree(former)
        else:
            temporary.rename(folder)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def load(folder: Path, device: torch.device | str = "cpu") -> GPT:
    """Open a GPT-2 folder, ours or one that transformers wrote. Returns the model in eval mode.

    Raises UserError if the folder is missing, damaged, or holds no GPT-2 in safetensors. It may be
    a stranger's: nothing in it is run, and config.json makes no model that is not in the file.
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
    except ValueError as problem:
        raise UserError(f"{folder / 'config.json'}: {problem}") from None
    with torch.device("meta"), _Undrawn():
        model = GPT(params, config["vocab_size"])
    try:
        model.load_state_dict(weights, assign=True)
    except RuntimeError:
        raise _unfit(folder, "names or shapes are not GPT-2's") from None
    return model.to(device).eval()


class _Undrawn(TorchFunctionMode):
    """Leaves weights without memory as they are. PyTorch draws nothing for them either, but imports
    its compiler to find that out, which takes 1.4 s."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function.__name__ == "normal_":
            return args[0] if args else kwargs["tensor"]
        return function(*args, **(kwargs or {}))


def _config(p: ModelParams, vocabulary: int) -> dict:
    return _GPT2 | {
        "architectures": ["GPT2LMHeadModel"],
        "vocab_size": vocabulary,
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


def _read_config(path: Path) -> dict:
    try:
        config = json.loads(files.read(path, most=1 << 20))
        if not isinstance(config, dict):
            raise ValueError
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(f"{path.parent} holds no model: `dvc repro train` makes one") from None
    except (ValueError, RecursionError, OSError):
        raise UserError(f"{path} cannot be read as JSON: make the folder again") from None
    for key, value in _GPT2.items():
        if config.get(key, value) != value:
            raise UserError(
                f"{path}: {key} is {_show(config[key])}; "
                f"Folio opens GPT-2 only, where it is {value!r}"
            )
    for key in ("n_layer", "n_head", "n_embd", "n_positions", "vocab_size"):
        size = config.get(key)
        if type(size) is not int or not 0 < size < 1 << 63:
            raise UserError(f"{path}: {key} is {_show(size)}; it must be an int from 1 to 2**63")
    if config.get("n_inner") not in (None, 4 * config["n_embd"]):
        raise UserError(f"{path}: n_inner is {_show(config['n_inner'])}; GPT-2's is 4 x n_embd")
    dropout = config.get("resid_pdrop", 0.1)
    if type(dropout) not in (int, float) or not 0 <= dropout < 1:
        raise UserError(f"{path}: resid_pdrop is {_show(dropout)}; it must be >= 0 and < 1")
    return config


def _read_weights(path: Path, config: dict) -> dict[str, torch.Tensor]:
    """The state of our GPT from transformers' names and layout; OpenAI's files have no prefix.

    The config's sizes are held against the file's header first. They cannot be larger than what
    the file really holds, so nor can the model that is made of them.
    """
    try:
        if not path.is_file() and path.exists():
            raise OSError("it is no file")
        with safe_open(path, framework="pt") as file:
            names = _names(file, path.parent)
            _check_header(file, names, path.parent, config)
            state = {}
            for name, theirs in names.items():
                tensor = file.get_tensor(theirs)
                tensor = tensor.t() if name.endswith(_TRANSPOSED) else tensor
                state[name] = tensor.float().contiguous()
            return state
    except FileNotFoundError:
        raise UserError(
            f"{path} is missing; pickled weights are not read:"
            " save them with transformers' save_pretrained, which writes safetensors"
        ) from None
    except (SafetensorError, OSError) as problem:
        why = repr(str(problem)[:150])  # it may quote the file
        raise UserError(f"{path} is damaged ({why}): make the folder again") from None


def _names(file: safe_open, folder: Path) -> dict[str, str]:
    """Our name of each tensor that the model has, and the file's."""
    names = {}
    for theirs in file.keys():  # noqa: SIM118
        prefix = "" if theirs.startswith(("transformer.", "lm_head.")) else "transformer."
        ours = prefix + theirs
        # The tied head again; the causal mask, which older files carry.
        if ours != "lm_head.weight" and not ours.endswith((".attn.bias", ".attn.masked_bias")):
            if ours in names:
                raise _unfit(folder, f"{_show(theirs)} is there twice")
            names[ours] = theirs
    return names


def _check_header(file: safe_open, names: dict[str, str], folder: Path, config: dict) -> None:
    shapes = {}
    for name, theirs in names.items():
        header = file.get_slice(theirs)
        if header.get_dtype() not in _FLOATS:
            raise _unfit(folder, f"{_show(theirs)} holds {header.get_dtype()}, not weights")
        shapes[name] = header.get_shape()
        if name.endswith(_TRANSPOSED) and len(shapes[name]) != 2:
            raise _unfit(folder, f"{_show(theirs)} is no matrix")
    for name, rows in (("wte", "vocab_size"), ("wpe", "n_positions")):
        found, said = shapes.get(f"transformer.{name}.weight"), [config[rows], config["n_embd"]]
        if found != said:
            raise _unfit(folder, f"{name}.weight is {_show(found)}, not {_show(said)}")
    if len(names) != 4 + 12 * config["n_layer"]:  # two embeddings, a norm; 12 tensors a block
        raise _unfit(folder, f"{len(names)} tensors are not {_show(config['n_layer'])} blocks'")


def _show(value: Any) -> str:
    """A stranger's value on one line, shortened: reprlib alone shows six levels of six items."""
    return reprlib.repr(value)[:100]


def _unfit(folder: Path, why: str) -> UserError:
    return UserError(
        f"{folder}: model.safetensors does not fit its config.json ({why}): make the folder again"
    )
