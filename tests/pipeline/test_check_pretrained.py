"""A folder in data/pretrained that vanishes or no longer fits costs no model."""

import shutil
from pathlib import Path

import pytest
from conftest import run, set_params, succeed


@pytest.fixture(scope="module")
def repo(make_trained) -> Path:
    """A project whose model has learned from teachers."""
    folder = make_trained(store=False)
    for name in ("1", "2"):
        shutil.copytree(folder / "models/gpt2", folder / "data/pretrained/teachers" / name)
    set_params(folder, {"train.distill_from": "teachers"})
    said = succeed(folder, "dvc", "repro")
    assert "2 teachers from data/pretrained/teachers: 1, 2" in said
    return folder


def damage(folder: Path, fault: str) -> None:
    if fault == "vanished":
        shutil.rmtree(folder)
    else:
        path = folder / "2/model.safetensors"
        path.write_bytes(path.read_bytes()[:-9])


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        ("vanished", "data/pretrained/teachers'"),
        ("truncated", "data/pretrained/teachers/2/model.safetensors is damaged"),
    ],
)
def test_check_fails_before_dvc_removes_the_model(repo, tmp_path, fault, words):
    kept = {path: path.read_bytes() for path in (repo / "models").rglob("*") if path.is_file()}
    folder = repo / "data/pretrained/teachers"
    shutil.copytree(folder, tmp_path / "teachers")
    damage(folder, fault)
    done = run(repo, "dvc", "repro")
    assert done.returncode and "failed to reproduce 'check_pretrained'" in done.stderr
    assert words in done.stderr and "Traceback" not in done.stderr
    assert {path: path.read_bytes() for path in kept} == kept
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(tmp_path / "teachers", folder)
    assert "Running stage" not in succeed(repo, "dvc", "repro")
