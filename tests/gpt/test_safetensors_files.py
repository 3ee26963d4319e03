"""Weights in several safetensors files with an index, as transformers writes them."""

import json
from pathlib import Path

import pytest
import safetensors.torch
import torch
import transformers
from conftest import NOT_FILES, replace_by

from folio import files
from folio.errors import UserError
from folio.gpt import huggingface, safetensors_files, weight_files

SIZES = {"n_layer": 2, "n_head": 2, "n_embd": 32, "n_positions": 16, "vocab_size": 101}


def write(folder: Path, seed: int = 1, max_shard_size: str = "20KB") -> Path:
    torch.manual_seed(seed)
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(**SIZES))
    model.save_pretrained(folder, max_shard_size=max_shard_size)
    return folder


@pytest.fixture
def folder(tmp_path) -> Path:
    return write(tmp_path / "sharded")


def shards(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.safetensors"))


def change_index(folder: Path, change) -> None:
    path = folder / weight_files.INDEX
    index = json.loads(path.read_text())
    change(index["weight_map"])
    path.write_text(json.dumps(index))


def load_error(folder: Path) -> str:
    with pytest.raises(UserError) as error:
        huggingface.load(folder)
    line = str(error.value)
    assert line.isprintable() and str(folder) in line and len(line) - len(str(folder)) < 400
    return line


@pytest.mark.parametrize("max_shard_size", ["1KB", "20KB", "60KB"])
def test_load_reads_shards_like_one_file(tmp_path, max_shard_size):
    sharded = write(tmp_path / "sharded", max_shard_size=max_shard_size)
    assert len(shards(sharded)) > 1 and not (sharded / "model.safetensors").exists()
    one = write(tmp_path / "one", max_shard_size="1GB")
    expected = huggingface.load(one).state_dict()
    found = huggingface.load(sharded).state_dict()
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


def test_one_file_is_preferred_to_an_index(folder):
    write(folder.parent / "other", seed=2, max_shard_size="1GB")
    (folder.parent / "other/model.safetensors").replace(folder / "model.safetensors")
    expected = huggingface.load(write(folder.parent / "other", seed=2)).state_dict()
    found = huggingface.load(folder).state_dict()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


@pytest.mark.parametrize(
    "name",
    [
        "../other/model-00001-of-00002.safetensors",
        "/etc/model.safetensors",
        "sub/model.safetensors",
        "..",
        "..\\model.safetensors",
        "model.bin",
        "a\0.safetensors",
        "a\n.safetensors",
        "x" * 300 + ".safetensors",
        "",
        None,
        7,
        ["model.safetensors"],
    ],
    ids=repr,
)
def test_index_that_names_a_file_elsewhere_is_rejected(folder, name):
    write(folder.parent / "other")
    change_index(folder, lambda names: names.update({"transformer.wte.weight": name}))
    assert "only reads .safetensors files in the same folder" in load_error(folder)


@pytest.mark.parametrize(
    "content",
    ["", "[]", "null", "{}", '{"weight_map": []}', '{"weight_map": null}', '"x"', "[" * 100_000,
     '{"weight_map":' * 100_000, "1" * 5_000, "\xff"],
    ids=lambda content: content[:20],
)  # fmt: skip
def test_damaged_index_is_named_in_the_error(folder, content):
    (folder / weight_files.INDEX).write_bytes(content.encode("latin-1"))
    assert "is not an index of weight files" in load_error(folder)


def test_index_without_files_or_with_too_many_is_rejected(folder):
    change_index(folder, dict.clear)
    assert "refers to 0 files" in load_error(folder)
    change_index(
        folder, lambda names: names.update({str(n): f"{n}.safetensors" for n in range(401)})
    )
    assert "refers to 401 files" in load_error(folder)


def test_huge_index_is_not_read(folder):
    with (folder / weight_files.INDEX).open("ab") as file:
        file.truncate(1 << 40)  # a sparse file
    assert "it is larger than" in load_error(folder)


@pytest.mark.parametrize("kind", NOT_FILES)
@pytest.mark.parametrize("which", ["index", "shard"])
def test_special_files_give_a_one_line_error_and_never_block(folder, which, kind):
    path = folder / weight_files.INDEX if which == "index" else shards(folder)[1]
    replace_by(path, kind)
    assert path.name in load_error(folder)


def test_missing_shard_is_named_in_the_error(folder):
    first = shards(folder)[0]
    first.unlink()
    assert f"{first} is missing" in load_error(folder)


def test_shard_that_does_not_have_the_tensors_of_the_index_is_named(folder):
    first, second, *_ = shards(folder)
    tensors = safetensors.torch.load_file(first)
    name = min(tensors)
    more = safetensors.torch.load_file(second) | {name: tensors[name]}  # in two shards
    content = second.read_bytes()
    safetensors.torch.save_file(more, second)
    assert f"index.json does not match {second.name} ('{name}')" in load_error(folder)
    second.write_bytes(content)
    del tensors[name]
    safetensors.torch.save_file(tensors, first)
    assert f"does not match {first.name} ('{name}')" in load_error(folder)
    change_index(folder, lambda names: names.pop(name))
    assert "27 tensors instead of 28" in load_error(folder)


def test_tensor_of_another_size_in_a_shard_is_rejected(folder):
    change = {"transformer.wte.weight": (7, 32), "transformer.ln_f.bias": (7,)}
    for path in shards(folder):
        tensors = safetensors.torch.load_file(path)
        tensors |= {n: torch.zeros(size) for n, size in change.items() if n in tensors}
        safetensors.torch.save_file(tensors, path)
    assert "wte.weight is [7, 32]" in load_error(folder)


def test_damaged_shard_is_named_in_the_error(folder):
    path = shards(folder)[-1]
    path.write_bytes(path.read_bytes()[:-1])
    assert f"{path} is damaged" in load_error(folder)


def tensor(start: int, end: int, shape=(2,), dtype="F32") -> dict:
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [start, end]}


@pytest.mark.parametrize(
    ("header", "reason"),
    [
        (b"", "header is incomplete"),
        ("[" * 100_000, "header is invalid"),
        ([], "header is invalid"),
        ({"a": None}, "header is invalid"),
        ({"a": {}}, "header is invalid"),
        ({"a": tensor(0, 16, shape=["4"])}, "header is invalid"),
        ({"a": tensor(0, 16, shape=[-4])}, "header is invalid"),
        ({"a": tensor(0, 16, shape=[4.0])}, "header is invalid"),
        ({"a": tensor(0, 16, shape=[2**64])}, "header is invalid"),
        ({"a": tensor(0, 16, dtype=["F32"], shape=[4])}, "header is invalid"),
        ({"a": tensor(0, 16)}, "header is invalid"),
        ({"a": tensor(16, 0, shape=[])}, "header is invalid"),
        ({"a": tensor(0, 8), "b": tensor(4, 12)}, "header is invalid"),  # they overlap
        ({"a": tensor(0, 8), "b": tensor(0, 8), "c": tensor(8, 16)}, "header is invalid"),
        ({"a": tensor(4, 12)}, "header is invalid"),  # a gap
        ({"a": tensor(0, 8)}, "bytes instead of"),
        ({"a": tensor(0, 8), "b": tensor(8, 24, shape=[4])}, "bytes instead of"),
    ],
)
def test_header_that_does_not_fit_its_file_is_an_error(tmp_path, header, reason):
    (tmp_path / "config.json").write_text(json.dumps(SIZES))
    content = header if isinstance(header, str | bytes) else json.dumps(header)
    content = content.encode() if isinstance(content, str) else content
    path = tmp_path / "model.safetensors"
    path.write_bytes(len(content).to_bytes(8, "little") + content + bytes(16))
    with pytest.raises(safetensors.SafetensorError):
        safetensors.torch.load_file(path)
    error = load_error(tmp_path)
    assert f"{path} is damaged" in error and reason in error


def test_weights_larger_than_the_memory_give_a_one_line_error(folder, monkeypatch):
    def empty(*_, **__):
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate ...")

    monkeypatch.setattr(torch, "empty", empty)
    with pytest.raises(UserError, match=r"there is not enough memory for its tensors"):
        safetensors_files.StoredTensor(folder, None, "F32", [2], 0, 8).read()


def test_sha256_of_one_file_is_that_of_the_file(tmp_path):
    one = write(tmp_path / "one", max_shard_size="1GB")
    assert weight_files.sha256(one) == files.sha256(one / "model.safetensors")


def test_sha256_covers_the_index_and_every_shard(folder):
    found = {weight_files.sha256(folder)}
    for path in [*shards(folder), folder / weight_files.INDEX]:
        content = path.read_bytes()
        path.write_bytes(content + b" ")
        found.add(weight_files.sha256(folder))
        path.write_bytes(content)
    assert len(found) == len(shards(folder)) + 2
    (folder / "README.md").write_text("about it")
    assert weight_files.sha256(folder) in found


def test_sha256_of_a_folder_without_weights_is_an_error(tmp_path):
    for name in ("", "nowhere"):
        with pytest.raises(UserError, match=r"is missing|there is no model in"):
            weight_files.sha256(tmp_path / name)
