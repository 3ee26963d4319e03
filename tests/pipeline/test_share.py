"""A trained model as others open it: exported from its folder and from MLflow, and in llama.cpp."""

import dataclasses
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import enter_copy, environment, folio, succeed
from huggingface_hub import ModelCard

from folio.cli.promote import promote_run
from folio.gpt import huggingface
from folio.inference.generation import generate
from folio.run import new_id, read_evaluation, read_record, read_training
from folio.tokens import tokenizer
from folio.tracking import logged_models
from folio.tracking.queries import find_run
from folio.tracking.store import Store
from folio.tracking.writer import RunWriter

NEW_FILES = ("generation_config.json", "tokenizer.json")  # not written by earlier versions


@pytest.fixture(scope="module")
def project(make_trained) -> Path:
    """A trained and evaluated project, whose model is the champion."""
    folder = make_trained()
    folio(folder, "promote")
    return folder


@pytest.fixture(scope="module")
def exported(project) -> Path:
    folio(project, "export", "from-folder/model")
    return project / "from-folder/model"


def without_network(folder: Path, script: str) -> str:
    """Run a script in a folder, in a process that cannot open a connection."""
    block = "import socket; socket.socket.connect = socket.create_connection = None\n"
    return succeed(folder, sys.executable, "-c", block + script, HF_HUB_OFFLINE="1")


def test_exported_card_has_the_figures_of_the_run(project, exported):
    card, metrics = ModelCard.load(exported / "README.md"), read_evaluation(project).summary
    found = {r.metric_name: r.metric_value for r in card.data.eval_results}
    assert found["validation loss, nats/token"] == round(metrics["evaluate/val_loss"], 4)
    assert len(found) == 4
    record = read_record(project / "models/training/record.json")
    assert record.tags["weights_sha256"] in card.text
    assert record.tags["mlflow.source.git.commit"] in card.text
    assert record.tags["mlflow.user"] not in card.text.split()
    assert card.data.license is None  # the text is the user's own


def test_same_model_is_exported_from_its_folder_and_from_mlflow(project, exported):
    name = read_record(project / "models/training/record.json").id
    for number, source in enumerate((name, "models:/folio@champion")):
        folio(project, "export", f"{number}/model", "--model", source)
        for path in exported.iterdir():
            other = (project / f"{number}/model" / path.name).read_bytes()
            assert sorted(other.splitlines()) == sorted(path.read_bytes().splitlines()), path.name


def test_code_on_the_card_runs_without_a_network(exported):
    blocks = re.findall(
        r"^```python\n(.*?)^```$", (exported / "README.md").read_text(), re.S | re.M
    )
    assert len(blocks) == 2
    script = f"{blocks[0]}\nlong_prompt = 'The sea ' * 100\nprint({blocks[1].strip()})"
    assert "generated_text" in without_network(exported, script)


def test_model_logged_by_an_earlier_version_can_still_be_used(project, tmp_path, monkeypatch):
    folder = enter_copy(project, tmp_path / "copy", monkeypatch)
    old = folder / "old/gpt2"
    shutil.copytree(folder / "models/gpt2", old)
    for name in NEW_FILES:
        (old / name).unlink()
    trained, store = read_training(folder), Store(None)
    record = dataclasses.replace(trained.record, id=new_id(), name="earlier version")
    summary = trained.summary | {"kept_val_loss": 0.1}
    run = dataclasses.replace(trained, record=record, summary=summary, model=old)
    RunWriter(store).send(run, "FINISHED")
    [model] = logged_models.find_all(store, find_run(store, record.id).id)
    assert logged_models.is_complete(store, model)
    assert "is now the champion" in promote_run(store, record.id)
    assert folio(folder, "sync") == "MLflow has every run\n"
    folio(folder, "export", "new", "--model", "models:/folio@champion")
    for path in (folder / "models/gpt2").iterdir():
        assert (folder / "new" / path.name).read_bytes() == path.read_bytes()


@pytest.mark.skipif("LLAMA_CPP" not in os.environ, reason="needs llama.cpp: see docs/share.md")
@pytest.mark.parametrize("kind", ["f32", "f16"])
def test_llama_cpp_generates_the_same_tokens(exported, tmp_path, kind):
    """LLAMA_CPP is a clone of llama.cpp; the package llama-cpp-python is installed."""
    converter = Path(os.environ["LLAMA_CPP"], "convert_hf_to_gguf.py")
    file, model = tmp_path / "model.gguf", huggingface.load(exported)
    convert = [sys.executable, str(converter), str(exported), "--outtype", kind]
    subprocess.run([*convert, "--outfile", str(file)], env=environment(), check=True)
    prompts = ["The sea", "a star\n\n", "before<|endoftext|>after", "\u4e2d \U0001f642"]
    script = f"""
import json, llama_cpp
model = llama_cpp.Llama({str(file)!r}, n_ctx=0, verbose=False)
for prompt in {prompts!r}:
    ids = model.tokenize(prompt.encode(), add_bos=False, special=False)
    model.reset()
    tokens = model.generate(ids, temp=0, repeat_penalty=1)
    room = {model.params.block_size} - len(ids)
    print(json.dumps([ids, [next(tokens) for _ in range(room)]]))
"""
    printed = succeed(tmp_path, sys.executable, "-c", script)
    results = [json.loads(line) for line in printed.splitlines() if line.startswith("[[")]
    for prompt, (ids, tokens) in zip(prompts, results, strict=True):
        assert ids == tokenizer.encode(prompt).tolist()
        room = model.params.block_size - len(ids)
        assert tokens == list(generate(model, ids, room, temperature=0))
