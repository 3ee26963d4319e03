"""An edit while a stage runs is not recorded as its input; an invalid param costs no model."""

import json
import os
import re
from pathlib import Path

import pytest
import torch
import yaml
from conftest import commit, run, run_stages, set_params, succeed

from folio.errors import UserError

# In the process of a stage: the first file that it writes also edits others.
EDIT = """
import sys
if sys.orig_argv[1:] == ["-m", "stages.{stage}"]:
    from pathlib import Path
    from folio import files
    write_text = files.write_text
    def write_and_edit(path, text):
        files.write_text = write_text
        for name, old, new in {edits!r}:
            edited = Path(name)
            edited.write_text(edited.read_text().replace(old, new))
        write_text(path, text)
    files.write_text = write_and_edit
"""
# A param that lets a stage run; and for each input: what the error calls it, its file, the edit.
EDITS = {
    "prepare": (
        "prepare.report_batch_size",
        {
            "prepare.validation_fraction": ("params.yaml", "fraction: 0.1", "fraction: 0.2"),
            "data/raw/verses.txt": ("data/raw/verses.txt", "star", "moon"),
        },
    ),
    "train": (
        "train.seed",
        {
            "train.grad_clip": ("params.yaml", "grad_clip: 1.0", "grad_clip: 0.5"),
            "model.dropout": ("params.yaml", "dropout: 0.1", "dropout: 0.2"),
            "folio/training/schedule.py": ("folio/training/schedule.py", '"""The', '"""the'),
        },
    ),
    "evaluate": (
        "evaluate.seed",
        {
            "evaluate.stride": ("params.yaml", "stride: 8", "stride: 4"),
            "folio/inference/params.py": ("folio/inference/params.py", '"""The', '"""the'),
        },
    ),
}


@pytest.fixture(scope="module")
def repo(make_trained) -> Path:
    return make_trained()


def edit_during(repo: Path, folder: Path, stage: str, edits: list[tuple[str, str, str]]):
    """Run a stage with `dvc repro`, with edits (path, old, new) in the middle of it."""
    folder.mkdir(exist_ok=True)
    (folder / "sitecustomize.py").write_text(EDIT.format(stage=stage, edits=edits))
    return run(repo, "dvc", "repro", stage, PYTHONPATH=f"{folder}:{repo}")


def entry(repo: Path, stage: str) -> dict:
    """What dvc.lock has of a stage."""
    return yaml.safe_load((repo / "dvc.lock").read_text())["stages"][stage]


def restore(repo: Path) -> None:
    run(repo, "git", "checkout", "HEAD", "--", ".")
    run(repo, "dvc", "checkout")


@pytest.mark.parametrize("stage", EDITS)
def test_edits_during_a_stage_are_not_recorded(repo, tmp_path, stage):
    param, edits = EDITS[stage]
    set_params(repo, {param: 77})
    before = {path: (repo / path).read_text() for path, *_ in edits.values()}
    recorded = entry(repo, stage)
    done = edit_during(repo, tmp_path / "site", stage, [*edits.values()])
    for path, text in before.items():
        assert (repo / path).read_text() != text, done.stdout + done.stderr
    assert done.returncode != 0 and f"changed while {stage} was running" in done.stderr
    for name in edits:
        assert name in done.stderr
    assert "Traceback" not in done.stderr
    assert entry(repo, stage) == recorded
    # With the edits undone, the result is that of the settings at the start, and so is the record.
    for path, text in before.items():
        (repo / path).write_text(text)
    again = run(repo, "dvc", "repro", stage)
    assert again.returncode == 0, again.stderr
    status = run(repo, "dvc", "status", "--json", stage).stdout
    assert json.loads(status) == {}
    restore(repo)


@pytest.mark.parametrize("stage", ["prepare", "train", "evaluate"])
def test_no_edit_goes_unnoticed_while_a_stage_exits(repo, tmp_path, stage):
    """A stage does not wait for what Python does at exit: it ends right after its last check."""
    edit = tmp_path / "edited while the process exits"
    code = f"import atexit, pathlib\natexit.register(pathlib.Path({str(edit)!r}).touch)\n"
    (tmp_path / "sitecustomize.py").write_text(code)
    done = run(repo, "python", "-m", f"stages.{stage}", PYTHONPATH=f"{tmp_path}:{repo}")
    assert done.returncode == 0 and done.stdout.endswith("\n"), done.stderr
    assert not edit.exists()
    assert run(repo, "python", "-c", "", PYTHONPATH=str(tmp_path)).returncode == 0
    assert edit.exists()  # in a process that exits as usual


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"prepare.corpus": "data/raw/none.txt"}, "'data/raw/none.txt' is neither tinyshakespeare"),
        ({"prepare.corpus": "../verses.txt"}, "prepare.corpus: "),
        ({"prepare.corpus": "x" * 5000}, "prepare.corpus: "),
        ({"prepare.corpus": "\0"}, "prepare.corpus: "),
        ({"train.init_from": "mine"}, "'mine' is not a GPT-2 folder in data/pretrained"),
        ({"train.init_from": ""}, "'' is not a GPT-2 folder in data/pretrained"),
        ({"train.distill_from": "mine"}, "'mine' is not a folder of GPT-2 folders in data/"),
    ],
)
def test_check_finds_a_missing_corpus_or_pretrained_folder(make_project, settings, words):
    folder = make_project(settings | {"train.tie_unseen_tokens": False}, store=False)
    with pytest.raises(UserError) as error:
        run_stages(folder, "check")
    assert words in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"processes": 3}, "3 processes cannot share the 4 windows of a step"),
        ({"processes": 2, "device": "cuda"}, "2 processes need as many GPUs, but this"),
    ],
)
def test_check_finds_more_processes_than_can_train(make_project, monkeypatch, settings, words):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    named = {f"runtime.{name}": value for name, value in settings.items()}
    folder = make_project({"train.batch_size": 1, "train.accumulation": 4} | named, store=False)
    with pytest.raises(UserError, match=words) as error:
        run_stages(folder, "check")
    assert "runtime.processes: " in str(error.value)


def test_check_accepts_more_processes_than_gpus_if_there_is_none(make_project, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)  # prepare may run on such a machine
    folder = make_project({"runtime.processes": 2, "runtime.device": "cuda"}, store=False)
    run_stages(folder, "check")


@pytest.mark.parametrize("name", ["raw", "pretrained"])
def test_check_finds_a_missing_file_in_a_folder_that_dvc_has_pulled(make_project, name):
    settings = {
        "raw": {"prepare.corpus": "data/raw/typo.txt"},
        "pretrained": {"train.init_from": "typo", "train.tie_unseen_tokens": False},
    }
    folder = make_project(settings[name], store=False)
    (folder / f"data/{name}").mkdir(exist_ok=True)
    (folder / f"data/{name}.dvc").write_text("outs: []\n")
    with pytest.raises(UserError, match="typo"):
        run_stages(folder, "check")


def test_git_restores_an_invalid_param_that_was_written_within_a_second(make_project):
    folder = make_project(store=False)
    commit(folder)
    params = folder / "params.yaml"
    before, status = params.read_text(), params.stat()
    params.write_text(before.replace("steps: 6", "steps: x"))
    os.utime(params, ns=(status.st_atime_ns, status.st_mtime_ns))
    with pytest.raises(UserError, match=r"train\.steps"):
        run_stages(folder, "check")
    succeed(folder, "git", "checkout", "HEAD", "--", "params.yaml")
    assert params.read_text() == before


def test_check_accepts_files_that_dvc_can_still_pull(make_project):
    settings = {"prepare.corpus": "data/raw/books/one.txt", "train.init_from": "mine"}
    folder = make_project(settings | {"train.tie_unseen_tokens": False}, store=False)
    for name in ("raw/books", "pretrained/mine"):
        (folder / f"data/{name}.dvc").write_text("outs: []\n")
    run_stages(folder, "check")
    assert (folder / "data/params.ok").exists()


INVALID = {
    "train.steps": "abc",
    "model.n_head": 3,
    "evaluate.stride": 64,
    "evaluate.top_p": 7,
    "prepare.validation_fraction": 2,
    "prepare.corpus": "data/raw/none.txt",
    "train.warmup_steps": 600,
    "runtime.device": "gpu",
}


@pytest.mark.parametrize("name", INVALID)
def test_check_finds_an_invalid_param(make_project, name):
    folder = make_project({name: INVALID[name]}, store=False)
    with pytest.raises(UserError, match=name.partition(".")[2]) as error:
        run_stages(folder, "check")
    assert "\n" not in str(error.value)


def test_invalid_param_is_found_before_dvc_removes_a_model(make_trained):
    repo = make_trained()
    kept = {path: path.read_bytes() for path in (repo / "models").rglob("*") if path.is_file()}
    for name in ("train.steps", "runtime.device"):  # a change in `runtime` alone runs no stage
        setting = f"{name}={INVALID[name]}"
        done = run(repo, "dvc", "exp", "run", "-S", "train.seed=78", "-S", setting)
        assert done.returncode != 0 and "Traceback" not in done.stderr
        assert name.partition(".")[2] in done.stderr
        for path, content in kept.items():
            assert path.read_bytes() == content, f"{setting}: {path}"
        [way_back] = re.findall(r"`(git [^`]+)`", done.stderr)
        run(repo, *way_back.split())
    assert "Running stage" not in run(repo, "dvc", "repro").stdout
    # A new text does not rerun check, because no param of a stage has changed.
    set_params(repo, {"runtime.log_interval": "abc"})
    with (repo / "data/raw/verses.txt").open("a") as file:
        file.write("One more line.\n")
    done = run(repo, "dvc", "repro")
    assert "folio prepare: params.yaml: runtime.log_interval: 'abc'" in done.stderr
    assert {path: path.read_bytes() for path in kept} == kept


def test_stage_that_fails_says_how_to_restore_what_dvc_removed(make_trained):
    repo = make_trained()
    weights = repo / "models/gpt2/model.safetensors"
    before = weights.read_bytes()
    done = run(repo, "dvc", "exp", "run", "-S", "model.block_size=9999")  # longer than the text
    assert done.returncode and not weights.exists()
    assert "; `dvc checkout` restores its previous results\n" in done.stderr
    succeed(repo, "sh", "-ec", "git checkout HEAD -- . && dvc checkout --force")
    assert weights.read_bytes() == before
