"""An edit while a stage runs is not recorded as its cause; an invalid param costs no model."""

import json
from pathlib import Path

import pytest
import yaml
from conftest import run, set_params

# In the process of a stage: the first file that it writes also edits another one.
EDIT = """
import sys
if sys.orig_argv[1:] == ["-m", "stages.{stage}"]:
    from pathlib import Path
    from folio import files
    write_text = files.write_text
    def write_and_edit(path, text):
        files.write_text = write_text
        edited = Path({path!r})
        edited.write_text(edited.read_text().replace({old!r}, {new!r}))
        write_text(path, text)
    files.write_text = write_and_edit
"""
EDITS = {
    "params of train": ("train", "params.yaml", "grad_clip: 1.0", "grad_clip: 0.5"),
    "params of the model": ("train", "params.yaml", "dropout: 0.1", "dropout: 0.2"),
    "source of train": ("train", "folio/training/schedule.py", '"""The', '"""the'),
    "params of evaluate": ("evaluate", "params.yaml", "stride: 8", "stride: 4"),
    "source of evaluate": ("evaluate", "folio/inference/params.py", '"""The', '"""the'),
    "text": ("prepare", "data/raw/verses.txt", "star", "moon"),
    "params of prepare": ("prepare", "params.yaml", "fraction: 0.1", "fraction: 0.2"),
}


@pytest.fixture(scope="module")
def repo(make_trained) -> Path:
    return make_trained()


def edit_during(repo: Path, folder: Path, stage: str, path: str, old: str, new: str):
    """Run `dvc repro` with an edit in the middle of a stage."""
    folder.mkdir(exist_ok=True)
    code = EDIT.format(stage=stage, path=path, old=old, new=new)
    (folder / "sitecustomize.py").write_text(code)
    return run(repo, "dvc", "repro", PYTHONPATH=f"{folder}:{repo}")


def entry(repo: Path, stage: str) -> dict:
    """What dvc.lock has of a stage."""
    return yaml.safe_load((repo / "dvc.lock").read_text())["stages"][stage]


def restore(repo: Path) -> None:
    run(repo, "git", "checkout", "HEAD", "--", ".")
    run(repo, "dvc", "checkout")


@pytest.mark.parametrize("name", EDITS)
def test_edit_during_a_stage_is_not_recorded(repo, tmp_path, name):
    stage, path, old, new = EDITS[name]
    first = {"prepare": "prepare.report_batch_size", "train": "train.seed"}
    set_params(repo, {first.get(stage, "evaluate.seed"): 77 + list(EDITS).index(name)})  # it runs
    before, recorded = (repo / path).read_text(), entry(repo, stage)
    done = edit_during(repo, tmp_path / "site", stage, path, old, new)
    after = (repo / path).read_text()
    assert after != before, done.stdout + done.stderr
    assert done.returncode != 0 and f"changed while {stage} was running" in done.stderr
    assert "Traceback" not in done.stderr
    assert entry(repo, stage) == recorded
    # With the edit undone, the result is that of the settings at the start, and so is the record.
    (repo / path).write_text(before)
    again = run(repo, "dvc", "repro")
    assert again.returncode == 0, again.stderr
    status = run(repo, "dvc", "status", "--json").stdout
    assert json.loads(status) == {}
    restore(repo)


def test_invalid_param_is_found_before_dvc_removes_a_model(make_trained):
    repo = make_trained()
    kept = {path: path.read_bytes() for path in (repo / "models").rglob("*") if path.is_file()}
    for setting in (
        "train.steps=abc",
        "model.n_head=3",
        "evaluate.stride=64",
        "evaluate.top_p=7",
        "prepare.validation_fraction=2",
        "runtime.device=gpu",
        "train.warmup_steps=600",
    ):
        done = run(repo, "dvc", "exp", "run", "-S", setting)
        assert done.returncode != 0 and "Traceback" not in done.stderr
        assert setting.partition("=")[0].partition(".")[2] in done.stderr
        for path, content in kept.items():
            assert path.read_bytes() == content, f"{setting}: {path}"
        run(repo, "git", "checkout", "HEAD", "--", ".")
    assert "Running stage" not in run(repo, "dvc", "repro").stdout


def test_changed_runtime_param_runs_the_check_alone(make_trained):
    repo = make_trained()
    set_params(repo, {"runtime.log_interval": 2})
    done = run(repo, "dvc", "repro")
    ran = [line for line in done.stdout.splitlines() if line.startswith("Running stage")]
    assert ran == ["Running stage 'check':"] or ran == []
