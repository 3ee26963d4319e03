"""`python -m folio export`: which folders it accepts and refuses, and that it loses nothing."""

import errno
import json
import shutil
from pathlib import Path

import pytest
import torch
import transformers  # imports its models when they are used
from conftest import folio

from folio.cli import model_card
from folio.errors import UserError
from folio.gpt import huggingface
from folio.gpt.model import GPT, ModelParams
from folio.tokens.tokenizer import VOCAB_SIZE

FILES = {
    "NOTICE", "README.md", "config.json", "generation_config.json", "merges.txt",
    "model.safetensors", "tokenizer.json", "tokenizer_config.json", "vocab.json",
}  # fmt: skip


@pytest.fixture
def project(tmp_path) -> Path:
    """A project with a model in models/gpt2, about which nothing is recorded."""
    shutil.copy(Path(__file__).parents[2] / "params.yaml", tmp_path)
    torch.manual_seed(1)
    sizes = ModelParams(n_layer=1, n_head=1, n_embd=8, block_size=8, dropout=0.0)
    huggingface.save(GPT(sizes, VOCAB_SIZE), tmp_path / "models/gpt2")
    return tmp_path


def error_of(project: Path, *words: str) -> str:
    before = {path for path in project.rglob("*") if not path.name.startswith(".export-")}
    with pytest.raises(UserError) as error:
        folio(project, "export", *words)
    assert set(project.rglob("*")) == before
    assert "\n" not in str(error.value)
    return str(error.value)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_export_writes_the_model_bit_for_bit_with_card_and_notice(project):
    printed = folio(project, "export", "out/shared")
    found, original = contents(project / "out/shared"), contents(project / "models/gpt2")
    assert found.keys() == FILES
    assert original.items() <= found.items()
    assert found["NOTICE"].decode().count("Copyright (c) 2019 OpenAI") == 1
    gaps = found["README.md"].decode().count("FILL IN")
    assert gaps and f"{gaps} places marked FILL IN" in printed
    assert max(map(len, printed.splitlines())) <= 80


def test_export_fills_an_empty_folder_and_follows_a_link_to_one(project):
    (project / "empty").mkdir()
    (project / "link").symlink_to("empty")
    folio(project, "export", "link")
    assert contents(project / "empty").keys() == FILES and (project / "link").is_symlink()


@pytest.mark.parametrize("target", ["data/raw/mine", "models/mine", ".dvc/mine"])
def test_export_refuses_the_folders_of_the_pipeline(project, target):
    assert f"{target} is in a folder of the pipeline" in error_of(project, target)
    assert not (project / target).exists()


def test_export_refuses_a_link_to_a_missing_folder(project, tmp_path):
    (project / "link").symlink_to(tmp_path / "missing/folder")
    assert "link is a link to" in error_of(project, "link")
    assert not (tmp_path / "missing").exists()


@pytest.mark.parametrize("target", ["models", "models/gpt2", ".", "params.yaml", "params.yaml/x"])
def test_export_replaces_nothing(project, target):
    assert target.removesuffix("/x") in error_of(project, target)


def test_failed_export_leaves_nothing_behind(project, monkeypatch):
    def fail(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(model_card, "write", fail)
    assert "No space left on device" in error_of(project, "out")


def test_model_of_an_earlier_version_gets_the_files_that_it_lacks(project):
    old, expected = project / "models/gpt2", contents(project / "models/gpt2")
    for name in ("generation_config.json", "tokenizer.json"):
        (old / name).unlink()
    config = json.loads((old / "config.json").read_text())
    del config["n_ctx"]
    (old / "config.json").write_text(json.dumps(config))
    folio(project, "export", "out")
    assert expected.items() <= contents(project / "out").items()


def test_gpt2_folder_of_transformers_can_be_exported(project):
    tokenizer = transformers.AutoTokenizer.from_pretrained(project / "models/gpt2")
    model = transformers.GPT2LMHeadModel.from_pretrained(project / "models/gpt2").half()
    for each in (tokenizer, model):
        each.save_pretrained(project / "other")
    folio(project, "export", "out", "--model", "other")
    loaded = huggingface.load(project / "out").transformer.wte.weight
    assert torch.equal(loaded, model.transformer.wte.weight.float())


@pytest.mark.parametrize("name", ["vocab.json", "tokenizer.json"])
def test_model_with_another_vocabulary_is_refused(project, name):
    path = project / "models/gpt2" / name
    path.write_text(path.read_text().replace('"hello"', '"hallo"'))
    assert f"models/gpt2/{name} is not GPT-2's vocabulary" in error_of(project, "out")
    path.write_text("{")
    assert f"models/gpt2/{name} is damaged" in error_of(project, "out")


def test_model_with_a_smaller_vocabulary_is_refused(project):
    sizes = ModelParams(n_layer=1, n_head=1, n_embd=8, block_size=8, dropout=0.0)
    huggingface.save(GPT(sizes, 503), project / "small")
    assert "small has 503 tokens instead of" in error_of(project, "out", "--model", "small")


def test_missing_model_is_a_one_line_error(project):
    assert "there is no folder models/other" in error_of(project, "out", "--model", "models/other")
    shutil.rmtree(project / "models/gpt2")
    assert "there is no model in models/gpt2" in error_of(project, "out")
