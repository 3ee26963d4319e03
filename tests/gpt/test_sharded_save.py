"""huggingface.save splits large weights into shards, as transformers does."""

import errno
import json
import weakref
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
import transformers
from conftest import SmallDisk

from folio.gpt import huggingface, safetensors_files, weight_files
from folio.gpt.model import GPT, ModelParams


@pytest.fixture(scope="module")
def large() -> GPT:
    """A model with 12.9 MB of weights: 50,257 rows of 48 channels, and two blocks."""
    torch.manual_seed(1)
    return GPT(ModelParams(n_layer=2, n_head=2, n_embd=48, block_size=16, dropout=0.1), 50_257)


def limit(monkeypatch, max_shard: int) -> None:
    monkeypatch.setattr(safetensors_files, "MAX_SHARD", max_shard)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.glob(weight_files.PATTERN)}


def test_single_file_has_the_bytes_of_the_safetensors_library(model, tmp_path):
    huggingface.save(model, tmp_path / "gpt2")
    found = contents(tmp_path / "gpt2")
    tensors = safetensors.torch.load(found["model.safetensors"])
    assert found == {"model.safetensors": safetensors.torch.save(tensors, {"format": "pt"})}
    assert torch.equal(tensors["transformer.wte.weight"], model.transformer.wte.weight)


@pytest.mark.parametrize("max_shard", [4_100, 6_000, 20_000, 40_000])
def test_shards_and_index_are_those_of_transformers(model, tmp_path, monkeypatch, max_shard):
    total = sum(p.numel() for p in model.parameters()) * 4
    limit(monkeypatch, max_shard)
    huggingface.save(model, tmp_path / "ours")
    for name, tensor in huggingface.load(tmp_path / "ours").state_dict().items():
        assert torch.equal(tensor, model.state_dict()[name]), name
    opened = transformers.GPT2LMHeadModel.from_pretrained(tmp_path / "ours")
    theirs = transformers.GPT2LMHeadModel(opened.config)  # with the layers in their own order
    theirs.load_state_dict(opened.state_dict())
    theirs.save_pretrained(tmp_path / "theirs", max_shard_size=max_shard)
    ours = contents(tmp_path / "ours")
    assert ours == contents(tmp_path / "theirs")
    assert (len(ours) > 2) == (weight_files.INDEX in ours) == (total > max_shard)


def test_limit_is_that_of_the_weights_in_a_file(model, tmp_path, monkeypatch):
    total = sum(p.numel() for p in model.parameters()) * 4
    for max_shard, files in ((total, 1), (total - 1, 3)):
        limit(monkeypatch, max_shard)
        huggingface.save(model, tmp_path / "gpt2")
        assert len(contents(tmp_path / "gpt2")) == files
    limit(monkeypatch, 1)  # less than any tensor: each has a file of its own
    huggingface.save(model, tmp_path / "gpt2")
    assert len(contents(tmp_path / "gpt2")) == 1 + len(model.state_dict())
    assert weight_files.has_sha256(tmp_path / "gpt2", weight_files.sha256(tmp_path / "gpt2"))


def test_weights_may_come_one_by_one_in_any_order(model, tmp_path, monkeypatch):
    row = np.arange(100) % model.transformer.wte.num_embeddings
    given = {name: tensor + 1 for name, tensor in model.state_dict().items()}
    for max_shard in (10**9, 6_000):
        limit(monkeypatch, max_shard)
        backwards = iter(reversed(given.items()))
        huggingface.save(model, tmp_path / "gpt2", row, weights=backwards)
        loaded = huggingface.load(tmp_path / "gpt2").state_dict()
        expected = given | {"transformer.wte.weight": given["transformer.wte.weight"][row]}
        assert loaded.keys() == expected.keys()
        assert all(torch.equal(loaded[name], tensor) for name, tensor in expected.items())


@pytest.mark.parametrize("change", ["missing", "unknown", "shape"])
def test_weights_that_are_not_the_models_leave_the_old_folder(model, tmp_path, change):
    huggingface.save(model, tmp_path / "gpt2")
    before = contents(tmp_path / "gpt2")
    weights = dict(model.state_dict())
    last = weights.pop("transformer.ln_f.bias")
    if change != "missing":
        weights |= {"x": last} if change == "unknown" else {"transformer.ln_f.bias": last[:-1]}
    with pytest.raises((AssertionError, KeyError)):
        huggingface.save(model, tmp_path / "gpt2", weights=weights.items())
    assert contents(tmp_path / "gpt2") == before and len(list(tmp_path.iterdir())) == 1


def test_save_holds_at_most_two_of_the_gathered_weights(model, tmp_path, monkeypatch):
    limit(monkeypatch, 6_000)
    alive: list[weakref.ref] = []

    def gathered():
        for name, tensor in model.state_dict().items():
            assert sum(each() is not None for each in alive) <= 1  # the one before
            copy = tensor.clone()
            alive.append(weakref.ref(copy))
            yield name, copy
            del copy

    huggingface.save(model, tmp_path / "gpt2", weights=gathered())
    assert len(alive) == len(model.state_dict()) and not any(each() is not None for each in alive)


@pytest.mark.parametrize("max_shard", [10**9, 1_000_000])
def test_full_disk_is_an_os_error_and_leaves_the_old_folder(
    large, model, small_disk: SmallDisk, monkeypatch, max_shard
):
    folder = small_disk.folder / "gpt2"
    huggingface.save(model, folder)
    before = contents(folder)
    limit(monkeypatch, max_shard)
    weights = iter(large.state_dict().items())
    with pytest.raises(OSError, match="No space left on device") as error:
        huggingface.save(large, folder, weights=weights)
    assert error.value.errno == errno.ENOSPC
    assert not list(weights)  # other processes took part in gathering all of them
    assert contents(folder) == before and len(list(small_disk.folder.iterdir())) == 1


def test_sharded_folder_replaces_one_file_and_the_reverse(model, tmp_path, monkeypatch):
    folder = tmp_path / "gpt2"
    for max_shard in (10**9, 6_000, 10**9):
        limit(monkeypatch, max_shard)
        huggingface.save(model, folder)
        names = contents(folder).keys()
        assert ("model.safetensors" in names) == (max_shard == 10**9)
        if len(names) > 1:
            index = json.loads((folder / weight_files.INDEX).read_text())
            assert names == {*index["weight_map"].values(), weight_files.INDEX}
        digest = weight_files.sha256(folder)
        assert weight_files.has_sha256(folder, digest) and weight_files.has_sha256(folder, None)
        assert not weight_files.has_sha256(folder, "")


@pytest.mark.parametrize("which", ["model-00002*", "*index.json"])
def test_changed_or_missing_shard_or_index_is_noticed(model, tmp_path, monkeypatch, which):
    limit(monkeypatch, 6_000)
    huggingface.save(model, tmp_path / "gpt2")
    digest = weight_files.sha256(tmp_path / "gpt2")
    [path] = (tmp_path / "gpt2").glob(which)
    content = path.read_bytes()
    path.write_bytes(content[:-1] + b" ")
    assert not weight_files.has_sha256(tmp_path / "gpt2", digest)
    path.write_bytes(content)
    assert weight_files.has_sha256(tmp_path / "gpt2", digest)
    path.unlink()
    assert not weight_files.has_sha256(tmp_path / "gpt2", digest)
