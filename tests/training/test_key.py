"""The identity of a training changes with everything that its weights depend on."""

import shutil
from dataclasses import replace

import pytest
from conftest import ROOT

from folio import params
from folio.gpt.model import ModelParams
from folio.training import key
from folio.training.key import train_key
from folio.training.params import TrainParams

MODEL, TRAIN = params.load(ROOT / "params.yaml", model=ModelParams, train=TrainParams)


def test_key_changes_with_data_and_params():
    keys = {
        train_key(MODEL, TRAIN, "data", None),
        train_key(MODEL, TRAIN, "other data", None),
        train_key(replace(MODEL, dropout=0.5), TRAIN, "data", None),
        train_key(MODEL, replace(TRAIN, seed=TRAIN.seed + 1), "data", None),
    }
    assert len(keys) == 4
    assert train_key(MODEL, TRAIN, "data", None) in keys


@pytest.mark.parametrize(
    ("file", "changes"),
    [
        ("folio/gpt/model.py", True),
        ("folio/gpt/cross_entropy_kernel.py", True),
        ("folio/tokens/batches.py", True),
        ("folio/training/optimizers.py", True),
        ("folio/training/a_new_module.py", True),
        ("folio/device.py", True),
        ("stages/train.py", True),
        ("folio/tracking/ui.py", False),
        ("folio/cli/compare.py", False),
        ("folio/sweeps/sweep.py", False),
        ("folio/app/html.py", False),
        ("folio/plots.py", False),
        ("folio/signals.py", False),
        ("folio/inference/generation.py", False),
    ],
)
def test_key_changes_only_with_sources_that_train_depends_on(file, changes, tmp_path, monkeypatch):
    for name in ("folio", "stages"):
        shutil.copytree(ROOT / name, tmp_path / name)
    monkeypatch.setattr(key, "ROOT", tmp_path)
    before = train_key(MODEL, TRAIN, "data", None)
    with (tmp_path / file).open("a") as source:
        source.write("# another comment\n")
    assert (train_key(MODEL, TRAIN, "data", None) != before) == changes
