"""Which models are loaded from a folder, and the one-line errors for those that are not."""

import shutil
from pathlib import Path

import pytest
import torch
from conftest import folio

from folio.errors import UserError
from folio.gpt import huggingface
from folio.gpt.model import GPT, ModelParams
from folio.run import RECORD, Record, lock_for_training, write_record
from folio.tokens.tokenizer import VOCAB_SIZE
from folio.tracking import model_loader
from folio.tracking.model_loader import load_model

CPU = torch.device("cpu")
LOCK = """\
stages:
  train:
    cmd: python -m stages.train
    outs:
    - path: models/gpt2
      md5: 0123456789abcdef0123456789abcdef.dir
"""


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    """A model folder with random weights."""
    folder = tmp_path_factory.mktemp("models") / "gpt2"
    sizes = ModelParams(n_layer=1, n_head=1, n_embd=8, block_size=8, dropout=0.0)
    huggingface.save(GPT(sizes, VOCAB_SIZE), folder)
    return folder


@pytest.fixture
def project(tmp_path, monkeypatch) -> Path:
    """An empty project, which is the current folder."""
    shutil.copy(Path(__file__).parents[2] / "params.yaml", tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DVC_ROOT", str(tmp_path))
    return tmp_path


def error_of(name: str) -> str:
    with pytest.raises(UserError) as error:
        load_model(name, None, CPU)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_model_that_was_never_trained_has_the_command_that_trains_it(project):
    for lock in (None, "", "5", "stages: {train: {outs: 5}}", "a: 2026-13-45", "{"):
        if lock is not None:
            (project / "dvc.lock").write_text(lock)
        expected = "there is no model in models/gpt2: `dvc repro` trains one"
        assert error_of("models/gpt2") == error_of("./models/gpt2/") == expected


def test_model_that_dvc_has_removed_has_the_command_that_restores_it(project):
    (project / "dvc.lock").write_text(LOCK)
    (project / ".checkpoints").mkdir()
    (project / ".checkpoints/0123.lock").touch()  # of a training run that was interrupted
    expected = "there is no model in models/gpt2: `dvc checkout` restores the previous one"
    for _ in range(2):
        assert error_of("models/gpt2").startswith(expected)
        (project / "models/gpt2").mkdir(parents=True, exist_ok=True)  # now without files


def test_model_that_is_being_trained_is_not_called_lost(project):
    (project / "dvc.lock").write_text(LOCK)
    with lock_for_training(project / ".checkpoints/0123"):
        expected = "there is no model in models/gpt2: it is being trained"
        assert error_of("models/gpt2").startswith(expected)
        assert error_of(str(project / "models/gpt2")).startswith(
            f"there is no folder {project}/models/gpt2"
        )
        with pytest.raises(UserError, match=expected):
            folio(project, "sample")
    assert "`dvc checkout` restores" in error_of("models/gpt2")


def test_models_gpt2_with_the_record_of_other_weights_is_refused(project, saved, monkeypatch):
    monkeypatch.setattr(model_loader, "_SAVING", 0)
    for name in ("gpt2", "mine"):
        shutil.copytree(saved, project / "models" / name)
    record = Record(id="a", name="b", started=1, params={}, tags={"weights_sha256": "0" * 64})
    write_record(record, project / "models/training" / RECORD)
    line = error_of("models/gpt2")
    assert line.startswith("models/gpt2 is damaged, or is not the model that models/training")
    load_model("models/mine", None, CPU)  # a folder of another name is not compared
