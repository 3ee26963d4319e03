"""Which models the page opens, and the one-line errors for names that refer to none."""

import shutil
from pathlib import Path

import pytest
import torch

from folio import device, files
from folio.app import models
from folio.errors import UserError
from folio.gpt import huggingface
from folio.gpt.model import GPT, ModelParams
from folio.run import HISTORY, RECORD, Record, write_history, write_record
from folio.tokens.tokenizer import VOCAB_SIZE


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory) -> Path:
    """A folder with a model of random weights in models/gpt2."""
    folder = tmp_path_factory.mktemp("models")
    torch.manual_seed(1)
    sizes = ModelParams(n_layer=1, n_head=1, n_embd=8, block_size=8, dropout=0.0)
    huggingface.save(GPT(sizes, VOCAB_SIZE), folder / "models/gpt2")
    return folder


@pytest.fixture
def project(pipeline, tmp_path, monkeypatch) -> Path:
    """A copy of it, which is the current folder."""
    shutil.copytree(pipeline, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    models._open.cache_clear()
    return tmp_path


def write_training(project: Path, weights: str) -> None:
    """A training that produced the weights with that sha256."""
    record = Record(id="a", name="b", started=1, params={}, tags={"weights_sha256": weights})
    write_record(record, project / "models/training" / RECORD)
    rows = [{"step": 1, "time": 1, "train_loss": 10.0}]
    write_history(rows, project / "models/training" / HISTORY)


def test_open_model_reads_a_model_once_until_its_files_change(project):
    first = models.open_model(models.PIPELINE)
    assert models.open_model(models.PIPELINE) is first
    weights = project / "models/gpt2/model.safetensors"
    files.write_text(project / "other", "")
    weights.touch()
    assert models.open_model(models.PIPELINE) is not first


def test_opened_model_generates_in_fp32_on_a_cpu(project):
    opened = models.open_model(models.PIPELINE)
    assert device.resolve_device("auto").type != "cpu" or opened.generating is opened.model


def test_opened_model_in_bf16_keeps_the_original_for_probabilities(project, monkeypatch):
    monkeypatch.setattr("folio.inference.precision.resolve_precision", lambda name, where: "bf16")
    opened = models.open_model(models.PIPELINE)
    assert opened.generating is opened.generating is not opened.model
    weights = [m.transformer.wte.weight for m in (opened.model, opened.generating)]
    assert [weight.dtype for weight in weights] == [torch.float32, torch.bfloat16]


def test_open_model_accepts_an_absolute_path(project):
    name = str(project / "models/gpt2")
    assert models.open_model(f" {name}\n").name == name


def test_open_model_finds_the_history_of_exactly_its_weights(project):
    write_training(project, files.sha256(project / "models/gpt2/model.safetensors"))
    assert [row["step"] for row in models.open_model(models.PIPELINE).history] == [1]


def test_open_model_ignores_the_history_of_other_weights(project):
    write_training(project, "0" * 64)
    shutil.copytree(project / "models/gpt2", project / "models/mine")
    assert models.open_model("models/mine").history == []


def test_open_model_says_why_there_is_no_model(project):
    shutil.rmtree(project / "models/gpt2")
    with pytest.raises(UserError, match="there is no model in models/gpt2: `dvc repro` trains one"):
        models.open_model(models.PIPELINE)


@pytest.mark.parametrize("name", ["x" * 5_000, "~nobody-of-that-name/x", "a\0b", "", None, "/x\n"])
def test_open_model_reports_an_invalid_name_in_one_line(project, name):
    with pytest.raises(UserError) as problem:
        models.open_model(name)
    assert "\n" not in str(problem.value)


def test_open_model_opens_only_the_pipelines_model_in_a_space(project, monkeypatch):
    monkeypatch.setattr(models, "IN_SPACE", True)
    assert models.open_model(models.PIPELINE).name == models.PIPELINE
    with pytest.raises(UserError, match="only the model models/gpt2 is available"):
        models.open_model(str(project))


def test_available_models_without_a_store_are_the_pipelines_alone(project):
    assert models.available() == [(models.PIPELINE, models.PIPELINE)]
