"""A stage's inputs: any change of a param, a source or a data file during a stage is noticed."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from conftest import ROOT, environment

from folio.errors import UserError
from folio.inputs import Inputs

DVC = """
stages:
  check:
    cmd: python -m stages.check
  train:
    cmd: python -m stages.train
    deps: [data/text, 'data/pretrained/${train.init_from}', folio/gpt, stages/train.py]
    params: [model, train]
"""
FILES = ("data/text/a.txt", "data/pretrained/mine/x", "folio/gpt/model.py", "stages/train.py")


@pytest.fixture
def root(tmp_path) -> Path:
    for name in (*FILES, "data/pretrained/other/x", "folio/tracking/ui.py"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("as it was at the start\n")
    (tmp_path / "dvc.yaml").write_text(DVC)
    shutil.copy(ROOT / ".dvcignore", tmp_path)
    set_values(tmp_path, model={"n_layer": 1}, train={"seed": 1, "init_from": "mine"}, runtime={})
    return tmp_path


def set_values(root: Path, **sections: dict) -> None:
    (root / "params.yaml").write_text(yaml.safe_dump(sections))


def message(inputs: Inputs) -> str:
    with pytest.raises(UserError) as error:
        inputs.check()
    assert "\n" not in str(error.value)
    return str(error.value)


def test_large_file_is_not_read_and_counts_as_changed_once_it_is_written(root):
    with (root / FILES[0]).open("wb") as file:
        file.truncate(1 << 40)  # a sparse file that would take minutes to read
    inputs = Inputs("train", root)
    inputs.check(strict=True)
    with (root / FILES[0]).open("rb+") as file:
        file.write(b"changed")
    assert "data/text/a.txt changed while train was running" in message(inputs)


def test_single_param_of_a_section_is_an_input(root):
    (root / "dvc.yaml").write_text(DVC.replace("[model, train]", "[model, train.init_from]"))
    inputs = Inputs("train", root)
    set_values(root, model={"n_layer": 1}, train={"seed": 2, "init_from": "mine"})
    inputs.check()  # train.seed is not listed
    (root / "data/pretrained/mine/x").write_text("another")
    assert "data/pretrained/mine/x changed" in message(inputs)
    set_values(root, model={"n_layer": 1}, train={"seed": 1, "init_from": "other"})
    assert "train.init_from in params.yaml ('mine' -> 'other')" in message(inputs)


def test_unchanged_inputs_pass(root):
    inputs = Inputs("train", root)
    inputs.check()
    os.utime(root / FILES[0])  # touched, with the same content
    (root / "folio/gpt/__pycache__").mkdir()
    (root / "folio/gpt/__pycache__/model.pyc").write_bytes(b"byte code")
    for name in (".model.py.swp", "model.py~", ".#model.py", "#model.py#", "4913", ".DS_Store"):
        (root / "folio/gpt" / name).write_text("written by an editor")
    (root / "folio/tracking/ui.py").write_text("no dep of train")
    (root / "data/pretrained/other/x").write_text("not in use")
    values = yaml.safe_load((root / "params.yaml").read_text())
    set_values(root, **values | {"runtime": {"log_interval": 3}})
    inputs.check()


@pytest.mark.parametrize("name", FILES)
def test_changed_file_is_named(root, name):
    inputs = Inputs("train", root)
    (root / name).write_text("another text of the same length"[:23])
    assert f"{name} changed while train was running" in message(inputs)


@pytest.mark.parametrize("name", FILES)
def test_changed_file_of_same_size_and_time_is_named(root, name):
    path, inputs = root / name, Inputs("train", root)
    stat, text = path.stat(), path.read_text()
    path.write_text(text.replace("start", "close"))
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert f"{name} changed" in message(inputs)


@pytest.mark.parametrize("name", FILES)
def test_file_that_was_changed_and_restored_is_noticed_if_asked(root, name):
    inputs = Inputs("train", root)
    inputs.check(strict=True)
    for content in ("another\n", "as it was at the start\n"):
        (root / name).write_text(content)
    inputs.check()
    with pytest.raises(UserError, match=f"{name} changed while train was running"):
        inputs.check(strict=True)


def test_added_and_removed_files_are_named(root):
    inputs = Inputs("train", root)
    (root / "data/text/b.txt").write_text("new")
    assert "data/text/b.txt changed" in message(inputs)
    (root / "data/text/b.txt").unlink()
    inputs.check()
    shutil.rmtree(root / "folio/gpt")
    assert "folio/gpt/model.py changed" in message(inputs)


@pytest.mark.parametrize(
    ("sections", "words"),
    [
        ({"train": {"seed": 5, "init_from": "mine"}}, "train.seed in params.yaml (1 -> 5)"),
        ({"train": {"seed": True, "init_from": "mine"}}, "train.seed in params.yaml (1 -> True)"),
        ({"train": {"init_from": "mine"}}, "train.seed in params.yaml (1 -> None)"),
        ({"model": {"n_layer": 2}}, "model.n_layer in params.yaml (1 -> 2)"),
        ({"model": None}, "model"),
    ],
)
def test_changed_params_are_named_with_both_values(root, sections, words):
    values = yaml.safe_load((root / "params.yaml").read_text())
    inputs = Inputs("train", root)
    set_values(root, **values | sections)
    assert words in message(inputs)


@pytest.mark.parametrize(
    ("before", "after", "differ"),
    [
        ("yes", "true", True),  # equal in YAML 1.1, but not for DVC
        ("on", "yes", True),
        ("1:40", "100", True),
        ("1e-3", "0.001", False),  # 1e-3 is a string in YAML 1.1
        ("'a'", "a", False),
    ],
)
def test_params_are_compared_as_dvc_reads_them(root, before, after, differ):
    path, text = root / "params.yaml", "model: {}\ntrain:\n  name: %s\n"
    path.write_text(text % before)
    inputs = Inputs("train", root)
    path.write_text(text % after)
    assert "train.name" in message(inputs) if differ else inputs.check() is None


@pytest.mark.parametrize("content", ["", "a: [", "\tno YAML", "model: 3\ntrain: x\n", None])
def test_params_file_that_became_unreadable_is_a_change(root, content):
    inputs = Inputs("train", root)
    path = root / "params.yaml"
    path.unlink() if content is None else path.write_text(content)
    assert "in params.yaml" in message(inputs)


def test_project_without_dvc_has_no_inputs(tmp_path):
    Inputs("train", tmp_path).check()


def test_stage_remembers_its_inputs_before_its_sources_are_imported(tmp_path):
    """The process is stopped in the import of a dep, and its params change in that moment."""
    for name in ("folio", "stages", "dvc.yaml", "params.yaml"):
        source = ROOT / name
        copy = shutil.copytree if source.is_dir() else shutil.copy
        copy(source, tmp_path / name)
    with (tmp_path / "folio/sections.py").open("a") as file:
        file.write("\nfrom pathlib import Path as P\n")
        file.write("P('params.yaml').write_text(P('params.yaml').read_text() + '# late\\n')\n")
        file.write("P('folio/params.py').open('a').write('# late')\n")
    command = [sys.executable, "-m", "stages.check"]
    done = subprocess.run(command, cwd=tmp_path, env=environment(), capture_output=True, text=True)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert "folio/params.py changed while check was running" in done.stderr
