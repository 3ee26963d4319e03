"""Folio and transformers read each other's GPT-2 folders; damaged or foreign ones are rejected."""

import json
import os
import resource
import shutil
import stat

import numpy as np
import pytest
import safetensors.torch
import torch
import transformers  # imports its models when they are used
from conftest import NOT_FILES, replace_by
from torch.nn import functional as F

from folio.errors import UserError
from folio.gpt import huggingface
from folio.gpt.model import GPT, ModelParams
from folio.inference.generation import generate
from folio.tokens import tokenizer

# n_layer, n_head, n_embd, block_size
SIZES = [(2, 2, 64, 32), (3, 4, 128, 64), (6, 6, 192, 64), (12, 12, 96, 16)]
SIZE_IDS = ["2x2x64", "3x4x128", "6x6x192", "12x12x96"]
ROWS = 503
TRANSPOSED = ("c_attn.weight", "c_proj.weight", "c_fc.weight")  # [in, out] in Conv1D


def gpt(n_layer=2, n_head=2, n_embd=64, block_size=32, dropout=0.0):
    params = ModelParams(
        n_layer=n_layer, n_head=n_head, n_embd=n_embd, block_size=block_size, dropout=dropout
    )
    torch.manual_seed(1)
    return shake(GPT(params, ROWS).eval())


@torch.no_grad()
def shake(model):
    """Move biases and norms, which start at 0 and 1, to values that affect the result."""
    for name, p in model.named_parameters():
        if p.dim() < 2 or "wte" in name:
            p += 0.2 * torch.randn_like(p)
    return model


def transformers_gpt(n_layer=2, n_head=2, n_embd=64, block_size=32):
    torch.manual_seed(2)
    config = transformers.GPT2Config(
        n_layer=n_layer, n_head=n_head, n_embd=n_embd, n_positions=block_size, vocab_size=ROWS,
        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    return shake(transformers.GPT2LMHeadModel(config).eval())


def assert_same(ours, other):
    """Compare the logits, and the gradient of every parameter."""
    ids = torch.randint(
        ROWS, (2, ours.params.block_size), generator=torch.Generator().manual_seed(3)
    )
    logits, other_logits = ours(ids), other(ids).logits
    assert logits.abs().max() > 1
    torch.testing.assert_close(logits, other_logits, rtol=0, atol=1e-4)
    ours.zero_grad(), other.zero_grad()
    y = ids.flip(0)
    ours.loss(ids, y).backward()
    F.cross_entropy(other_logits.flatten(0, 1), y.flatten()).backward()
    gradients = {name: p.grad for name, p in other.named_parameters()}
    assert gradients.keys() == {name for name, _ in ours.named_parameters()}
    for name, p in ours.named_parameters():
        expected = gradients[name].T if name.endswith(TRANSPOSED) else gradients[name]
        assert p.grad.abs().max() > 0, name
        torch.testing.assert_close(p.grad, expected, rtol=1e-3, atol=1e-5)


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def load_error(folder):
    """The one-line error of loading a folder, which it names."""
    with pytest.raises(UserError) as error:
        huggingface.load(folder)
    assert "\n" not in str(error.value)
    assert str(folder) in str(error.value)
    return str(error.value)


def change(path, **values):
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


@pytest.fixture(scope="module")
def model():
    return gpt()


@pytest.fixture(scope="module")
def saved(model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved") / "gpt2"
    huggingface.save(model, folder)
    return folder


@pytest.fixture
def folder(saved, tmp_path):
    return shutil.copytree(saved, tmp_path / "gpt2")


# --- both directions


@pytest.mark.parametrize("size", SIZES, ids=SIZE_IDS)
def test_transformers_computes_the_same_from_a_saved_folder(size, tmp_path):
    ours = gpt(*size)
    huggingface.save(ours, tmp_path / "gpt2")
    other, report = transformers.GPT2LMHeadModel.from_pretrained(
        tmp_path / "gpt2", output_loading_info=True
    )
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert_same(ours, other.eval())


@pytest.mark.parametrize("size", SIZES, ids=SIZE_IDS)
def test_load_computes_the_same_from_a_folder_of_transformers(size, tmp_path):
    other = transformers_gpt(*size)
    other.save_pretrained(tmp_path)
    assert_same(huggingface.load(tmp_path), other)


def test_load_accepts_openais_names_without_a_prefix(tmp_path):
    other = transformers_gpt()
    other.save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    tensors = safetensors.torch.load_file(path)
    tensors = {name.removeprefix("transformer."): t for name, t in tensors.items()}
    for layer in range(2):  # causal masks, as in the files on the hub
        tensors[f"h.{layer}.attn.bias"] = torch.ones(1, 1, 32, 32).tril()
    tensors["lm_head.weight"] = tensors["wte.weight"].clone()
    safetensors.torch.save_file(tensors, path)
    assert_same(huggingface.load(tmp_path), other)


def test_load_converts_half_precision_to_fp32(tmp_path):
    transformers_gpt().half().save_pretrained(tmp_path)
    model = huggingface.load(tmp_path)
    assert all(p.dtype == torch.float32 and p.is_contiguous() for p in model.parameters())
    assert_same(model, transformers_gpt().half().float())


def test_load_returns_what_save_wrote_bit_for_bit_in_eval_mode(folder, model):
    loaded = huggingface.load(folder)
    assert loaded.params == model.params and not loaded.training
    for (name, p), (other_name, q) in zip(
        loaded.named_parameters(), model.named_parameters(), strict=True
    ):
        assert name == other_name and p.requires_grad
        assert torch.equal(p, q)


def test_transformers_generates_the_same_text(tmp_path):
    model, prompt = gpt(), [11, 7, 5]
    with torch.no_grad():
        for p in model.parameters():
            p += 0.2 * torch.randn_like(p)
    huggingface.save(model, tmp_path / "gpt2")
    other = transformers.GPT2LMHeadModel.from_pretrained(tmp_path / "gpt2")
    text = other.generate(torch.tensor([prompt]), max_new_tokens=20, do_sample=False)[0].tolist()
    assert len(set(text)) > 10
    assert [*prompt, *generate(model, prompt, 20, 0.0)] == text


# --- the other files


def test_saved_folder_has_the_files_of_transformers_and_no_pickle(folder):
    assert contents(folder).keys() == {
        "config.json", "generation_config.json", "merges.txt", "model.safetensors",
        "tokenizer.json", "tokenizer_config.json", "vocab.json",
    }  # fmt: skip


def test_auto_tokenizer_opens_the_saved_folder(folder):
    opened = transformers.AutoTokenizer.from_pretrained(folder)
    text = (
        "First Citizen:\nBefore we proceed any further, hear me speak.\n\n  na\u00efve \U0001f642"
    )
    assert len(opened) == tokenizer.VOCAB_SIZE
    assert opened(text)["input_ids"] == tokenizer.encode(text).tolist()
    assert opened.decode(tokenizer.encode(text).tolist()) == text


def test_saved_config_describes_the_model(tmp_path):
    huggingface.save(gpt(3, 4, 128, 64, dropout=0.3), tmp_path / "gpt2")
    config = transformers.GPT2Config.from_pretrained(tmp_path / "gpt2")
    assert (config.n_layer, config.n_head, config.n_embd, config.n_positions) == (3, 4, 128, 64)
    assert config.n_ctx == 64  # llama.cpp's converter requires it
    assert config.vocab_size == ROWS and config.architectures == ["GPT2LMHeadModel"]
    assert (config.embd_pdrop, config.attn_pdrop, config.resid_pdrop) == (0.3, 0.3, 0.3)
    assert (config.bos_token_id, config.eos_token_id) == (50_256, 50_256)
    assert config.activation_function == "gelu_new" and config.layer_norm_epsilon == 1e-5
    assert config.tie_word_embeddings and config.scale_attn_weights
    assert huggingface.load(tmp_path / "gpt2").params.dropout == 0.3


def test_save_gives_each_token_its_row(tmp_path, model):
    row = np.random.default_rng(1).integers(ROWS, size=1_000).astype(np.uint16)
    huggingface.save(model, tmp_path / "gpt2", row)
    loaded = huggingface.load(tmp_path / "gpt2").transformer.wte.weight
    assert torch.equal(loaded, model.transformer.wte.weight[torch.from_numpy(row.astype(int))])


@pytest.mark.parametrize("umask", [0o022, 0o027])
def test_saved_files_have_the_permissions_of_the_umask(model, tmp_path, umask):
    before = os.umask(umask)
    try:
        huggingface.save(model, tmp_path / "gpt2")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "gpt2").stat().st_mode) == 0o777 & ~umask
    for path in (tmp_path / "gpt2").iterdir():
        assert stat.S_IMODE(path.stat().st_mode) == 0o666 & ~umask, path.name


# --- errors


def test_save_replaces_the_whole_folder(folder):
    (folder / "old file").touch()
    huggingface.save(gpt(n_layer=1), folder)
    assert huggingface.load(folder).params.n_layer == 1
    assert "old file" not in contents(folder)


@pytest.mark.parametrize(
    "limit", [1_000, 600_000]
)  # fails in the weights; in the tokenizer's files
def test_failed_save_leaves_the_old_folder_and_nothing_else(folder, model, limit):
    before = contents(folder)
    other = gpt(n_layer=1)  # 212 kB of weights; vocab.json is 1 MB
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))  # bytes per file, as on a full disk
    try:
        with pytest.raises(OSError, match="File too large"):
            huggingface.save(other, folder)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert contents(folder) == before
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]


def test_missing_folder_gives_a_one_line_error_with_a_hint(tmp_path):
    error = load_error(tmp_path / "nowhere")
    assert error.startswith("there is no model in") and "`dvc repro train` trains one" in error
    assert "there is no model in" in load_error(tmp_path)


def test_file_in_place_of_the_folder_gives_a_one_line_error(tmp_path):
    (tmp_path / "file").touch()
    assert "there is no model in" in load_error(tmp_path / "file")


@pytest.mark.parametrize("damage", ["truncated", "empty", "pickle", "header"])
def test_damaged_weights_are_named_in_the_error(folder, damage):
    path = folder / "model.safetensors"
    content = path.read_bytes()
    path.write_bytes(
        {
            "truncated": content[:-1],
            "empty": b"",
            "pickle": b"\x80\x02}q\x00." * 100,
            "header": content[:8] + b"\xff" + content[9:],
        }[damage]
    )
    assert "model.safetensors is damaged" in load_error(folder)


def test_pickled_weights_are_rejected(folder):
    weights = safetensors.torch.load_file(folder / "model.safetensors")
    torch.save(weights, folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    error = load_error(folder)
    assert "model.safetensors is missing, and Folio does not read pickled weights" in error
    assert "save_pretrained" in error


def test_weights_of_other_shapes_or_another_number_are_rejected(folder):
    path = folder / "model.safetensors"
    weights = safetensors.torch.load_file(path)
    change(folder / "config.json", n_layer=3)
    assert "do not match config.json" in load_error(folder)
    change(folder / "config.json", n_layer=2, vocab_size=ROWS + 1)
    assert "do not match config.json" in load_error(folder)
    change(folder / "config.json", vocab_size=ROWS)
    safetensors.torch.save_file(weights | {"extra": torch.ones(1)}, path)
    assert "do not match config.json" in load_error(folder)
    safetensors.torch.save_file(weights, path)
    huggingface.load(folder)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("model_type", "llama"),
        ("activation_function", "relu"),
        ("layer_norm_epsilon", 1e-6),
        ("scale_attn_weights", False),
        ("scale_attn_by_inverse_layer_idx", True),
        ("tie_word_embeddings", False),
        ("n_inner", 64),
        ("n_layer", 0),
        ("n_head", None),
        ("n_embd", "64"),
        ("n_positions", True),
        ("vocab_size", 1.5),
        ("n_layer", 2**63),
        ("resid_pdrop", "0.1"),
        ("resid_pdrop", None),
        ("resid_pdrop", True),
        ("resid_pdrop", 1.0),
        ("resid_pdrop", -0.1),
        ("resid_pdrop", float("nan")),
    ],
)
def test_config_of_another_arithmetic_is_rejected_with_its_key(folder, key, value):
    change(folder / "config.json", **{key: value})
    error = load_error(folder)
    assert f"{key} is " in error and str(value) in error


def test_config_keys_default_to_those_of_gpt2(folder, model):
    sizes = {"n_layer": 2, "n_head": 2, "n_embd": 64, "n_positions": 32, "vocab_size": ROWS}
    (folder / "config.json").write_text(json.dumps(sizes))
    assert huggingface.load(folder).params.n_embd == model.params.n_embd


@pytest.mark.parametrize("content", ["", "{", "[]", "null", '"gpt2"', "\udcff"])
def test_damaged_config_is_named_in_the_error(folder, content):
    (folder / "config.json").write_bytes(content.encode("utf-8", "surrogateescape"))
    assert "config.json cannot be read as JSON" in load_error(folder)


@pytest.mark.parametrize("content", ["[" * 100_000, '{"n_layer":' * 50_000, "1" * 5_000])
def test_config_that_makes_json_overflow_gives_a_one_line_error(folder, content):
    (folder / "config.json").write_text(content)
    assert "config.json cannot be read as JSON" in load_error(folder)


def test_huge_config_is_not_read(folder):
    with (folder / "config.json").open("ab") as file:
        file.truncate(1 << 40)  # a sparse file
    assert "config.json cannot be read: it is larger than" in load_error(folder)


def test_long_config_value_is_shortened_in_the_error(folder):
    change(folder / "config.json", activation_function=[[[[["relu"] * 9] * 9] * 9] * 9] * 9)
    assert len(load_error(folder)) - len(str(folder)) < 200


@pytest.mark.parametrize(
    ("key", "value"),
    [("n_layer", 10**9), ("vocab_size", 10**12), ("n_positions", 10**12), ("n_embd", 10**12)],
)
def test_config_with_false_sizes_builds_no_model(folder, monkeypatch, key, value):
    def build(*_):
        raise AssertionError("a model was built from a config with false sizes")

    change(folder / "config.json", **{key: value})
    monkeypatch.setattr(huggingface, "GPT", build)
    assert "do not match config.json" in load_error(folder)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (
            lambda t: t | {"transformer.wpe.weight": t["transformer.wpe.weight"].long()},
            "has dtype 'I64'",
        ),
        (lambda t: t | {"wte.weight": t["transformer.wte.weight"].clone()}, "occurs twice"),
        (lambda t: t | {"transformer.wte.weight": torch.zeros(3)}, "wte.weight is [3]"),
        (
            lambda t: t | {"transformer.h.0.attn.c_attn.weight": torch.zeros(2, 2, 2)},
            "h.0.attn.c_attn.weight is [2, 2, 2], not [64, 192]",
        ),
        (lambda t: {k: v for k, v in t.items() if k != "transformer.ln_f.bias"}, "27 tensors"),
        (
            lambda t: {k.replace("ln_f.bias", "ln_f.b"): v for k, v in t.items()},
            "ln_f.bias is missing",
        ),
        (lambda t: t | {"transformer.ln_f.bias": torch.zeros(63)}, "ln_f.bias is [63], not [64]"),
    ],
    ids=["dtype", "twice", "shape", "rank", "missing", "name", "norm"],
)
@pytest.mark.filterwarnings("error::UserWarning")
def test_tensors_of_another_model_are_named_in_the_error(folder, change, reason):
    path = folder / "model.safetensors"
    safetensors.torch.save_file(change(safetensors.torch.load_file(path)), path)
    error = load_error(folder)
    assert "do not match config.json" in error and reason in error


@pytest.mark.parametrize("value", ["nan", "inf", "-inf"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize(
    "name", ["transformer.wte.weight", "transformer.h.1.mlp.c_fc.weight", "transformer.ln_f.bias"]
)
def test_weights_that_are_not_finite_are_named_in_the_error(folder, name, dtype, value):
    path = folder / "model.safetensors"
    tensors = {n: t.to(dtype) for n, t in safetensors.torch.load_file(path).items()}
    tensors[name].view(-1)[-1] = float(value)
    safetensors.torch.save_file(tensors, path)
    assert f"{name} has values that are NaN or infinite" in load_error(folder)


def test_weights_beyond_the_range_of_fp32_are_named_in_the_error(folder):
    path = folder / "model.safetensors"
    tensors = {n: t.double() for n, t in safetensors.torch.load_file(path).items()}
    tensors["transformer.ln_f.bias"][0] = 1e300
    safetensors.torch.save_file(tensors, path)
    assert "transformer.ln_f.bias has values that are NaN or infinite" in load_error(folder)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
@pytest.mark.parametrize("kind", NOT_FILES)
def test_special_files_give_a_one_line_error_and_never_block(folder, name, kind):
    replace_by(folder / name, kind)
    assert name in load_error(folder)


def test_config_with_contradicting_sizes_gives_a_one_line_error(folder):
    change(folder / "config.json", n_head=3)
    assert "config.json: n_embd: 64 is not divisible by n_head 3" in load_error(folder)
