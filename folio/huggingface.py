"""GPT-2 as a Hugging Face folder, out and in: safetensors, config.json, tokenizer files."""

import json
import shutil
from pathlib import Path

import numpy as np
import safetensors.torch
import torch
from safetensors import SafetensorError

from folio import tokenizer
from folio.errors import UserError
from folio.model import GPT, ModelParams

# transformers keeps these four as Conv1D, whose weight is [in, out]: the transpose of a Linear's.
_TRANSPOSED = ("c_attn.weight", "c_proj.weight", "c_fc.weight")

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

    Raises UserError if the folder is missing, damaged, or holds no GPT-2 in safetensors.
    """
    config = _read_config(folder)
    try:
        params = ModelParams(
            n_layer=config["n_layer"],
            n_head=config["n_head"],
            n_embd=config["n_embd"],
            block_size=config["n_positions"],
            dropout=config.get("resid_pdrop", 0.1),
        )
    except ValueError as problem:
        raise UserError(f"{folder / 'config.json'}: {problem}") from None
    weights = _read_weights(folder / "model.safetensors")
    with torch.device("meta"):
        model = GPT(params, config["vocab_size"])
    try:
        model.load_state_dict(weights, assign=True)
    except RuntimeError:
        raise UserError(f"{folder}: model.safetensors does not fit its config.json") from None
    return model.to(device).eval()


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
        "bos_token_id": tokenizer.VOCABULARY - 1,
        "eos_token_id": tokenizer.VOCABULARY - 1,
        "dtype": "float32",
    }


def _read_config(folder: Path) -> dict:
    path = folder / "config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(config, dict):
            raise ValueError
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(f"{folder} holds no model: `dvc repro train` makes one") from None
    except (ValueError, OSError):
        raise UserError(f"{path} cannot be read as JSON: make the folder again") from None
    for key, value in _GPT2.items():
        if config.get(key, value) != value:
            raise UserError(
                f"{path}: {key} is {config[key]!r}; Folio opens GPT-2 only, where it is {value!r}"
            )
    for key in ("n_layer", "n_head", "n_embd", "n_positions", "vocab_size"):
        if type(config.get(key)) is not int or config[key] < 1:
            raise UserError(f"{path}: {key} is {config.get(key)!r}; it must be an int >= 1")
    if config.get("n_inner") not in (None, 4 * config["n_embd"]):
        raise UserError(f"{path}: n_inner is {config['n_inner']}; GPT-2's is 4 x n_embd")
    return config


def _read_weights(path: Path) -> dict[str, torch.Tensor]:
    """The state of our GPT from transformers' names and layout; OpenAI's files have no prefix."""
    try:
        tensors = safetensors.torch.load_file(path)
    except FileNotFoundError:
        raise UserError(
            f"{path} is missing; pickled weights are not read:"
            " save them with transformers' save_pretrained, which writes safetensors"
        ) from None
    except (SafetensorError, OSError) as problem:
        raise UserError(f"{path} is damaged ({problem}): make the folder again") from None
    state = {}
    for name, tensor in tensors.items():
        name = name if name.startswith(("transformer.", "lm_head.")) else f"transformer.{name}"
        if name == "lm_head.weight" or name.endswith((".attn.bias", ".attn.masked_bias")):
            continue  # the tied head again; the causal mask, which older files carry
        tensor = tensor.T if name.endswith(_TRANSPOSED) else tensor
        state[name] = tensor.float().contiguous()
    return state
