"""What `doctor` finds in a project: each problem with its true cause and a remedy."""

import errno
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import commit, succeed

from folio import commands, user
from folio.cli import project_checks
from folio.cli.project_checks import Finding
from folio.run import Record, lock_for_training, write_history, write_record


@pytest.fixture
def project(tmp_path, monkeypatch) -> Path:
    """A folder with a .dvc folder, which is the current folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DVC_ROOT", str(tmp_path))
    monkeypatch.setattr(commands, "dvc", lambda *_: ".dvc/cache\n")
    (tmp_path / ".dvc/tmp/exps").mkdir(parents=True)
    return tmp_path


def hints(check) -> list[str]:
    return [f"{found.text}: {found.hint}" for found in check() if found.hint]


# --- DVC


def users(pid: int) -> str:
    info = {"pid": pid, "cmd": "dvc repro"}
    return json.dumps({"write": {"/x": info}, "read": {"/y": [info]}})


@pytest.mark.parametrize("name", project_checks.RWLOCKS)
@pytest.mark.parametrize(
    "content",
    ["", "{", '{"write": {', "[]", "5", '{"write": []}', '{"read": {"x": [{}]}}', "\0" * 40],
)
def test_damaged_rwlock_is_reported_with_its_removal(project, name, content):
    (project / name).write_text(content)
    [line] = hints(project_checks.dvc_project)
    assert line == f"{name} is damaged, so dvc fails: `rm -r {name}`"
    subprocess.run(["sh", "-ec", line.split("`")[1]], check=True)
    assert hints(project_checks.dvc_project) == []


def test_rwlock_of_a_process_that_is_not_dvc_is_reported(project):
    rwlock = project / ".dvc/tmp/rwlock"
    rwlock.write_text(users(os.getpid()))  # as if dvc's id had been reused after a restart
    [line] = hints(project_checks.dvc_project)
    assert f"lists process {os.getpid()}, which is not a dvc process of this project" in line
    assert line.endswith(": `rm -r .dvc/tmp/rwlock`")


def test_rwlock_of_processes_that_have_ended_is_left_to_dvc(project):
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    for content in (users(ended.pid), "{}", '{"write": {}, "read": {}}'):
        (project / ".dvc/tmp/rwlock").write_text(content)
        assert hints(project_checks.dvc_project) == []


def test_running_dvc_is_not_called_stale(project):
    code = "import time; time.sleep(60)"
    (project / "dvc").write_text(code)
    running = subprocess.Popen([sys.executable, str(project / "dvc"), "repro"], cwd=project)
    try:
        (project / ".dvc/tmp/rwlock").write_text(users(running.pid))
        findings = list(project_checks.dvc_project())
        assert Finding(f"dvc is running: process {running.pid}") in findings
        assert not any(found.hint for found in findings)
    finally:
        running.kill()
        running.wait()


@pytest.mark.parametrize("folder", [".dvc/tmp/exps/standalone/tmpx1/data", "data"])
def test_stage_in_a_copy_of_the_project_counts_as_running_dvc(project, folder):
    """As for `dvc exp run --temp`, which may also be started in a subfolder."""
    (project / folder).mkdir(parents=True, exist_ok=True)
    (project / folder / "sleep.py").write_text("import time; time.sleep(60)")
    command = [sys.executable, "sleep.py", "stages.evaluate"]
    running = subprocess.Popen(command, cwd=project / folder)
    try:
        assert project_checks.dvc_processes() == [running.pid]
    finally:
        running.kill()
        running.wait()


# --- folders


@pytest.mark.parametrize("name", project_checks._FOLDERS)
def test_file_in_place_of_a_folder_is_reported(project, name):
    shutil.rmtree(project / name, ignore_errors=True)
    (project / name).parent.mkdir(exist_ok=True, parents=True)
    (project / name).write_text("")
    [line] = hints(project_checks.project_folders)
    assert line.startswith(f"{name} is a file where Folio needs a folder: `mv {name} ")
    subprocess.run(["sh", "-ec", line.split("`")[1]], check=True)
    assert hints(project_checks.project_folders) == []


def test_link_to_a_missing_folder_is_reported(project):
    (project / "mlruns").symlink_to("/nowhere")
    [line] = hints(project_checks.project_folders)
    assert line == "mlruns is a link to a folder that does not exist: `rm mlruns`"


# --- git


@pytest.fixture
def repository(project) -> Path:
    (project / "params.yaml").write_text("a: 1\n")
    commit(project)
    return project


def texts() -> list[str]:
    return [found.text for found in project_checks.git_repository()]


def test_commit_and_branch_are_shown(repository):
    branch = succeed(repository, "git", "symbolic-ref", "--short", "HEAD").strip()
    [text] = texts()
    assert text.endswith(f", branch {branch}")


@pytest.mark.parametrize(
    ("staged", "words"), [(False, "has changes"), (True, "has staged changes")]
)
def test_changed_params_are_shown_and_are_no_problem(repository, staged, words):
    (repository / "params.yaml").write_text("a: 2\n")
    if staged:
        succeed(repository, "git", "add", "params.yaml")
    _, text = texts()
    assert words in text and "`git checkout HEAD -- . && dvc checkout --force`" in text
    assert hints(project_checks.git_repository) == []
    succeed(repository, "git", "checkout", "HEAD", "--", ".")
    assert (repository / "params.yaml").read_text() == "a: 1\n" and len(texts()) == 1


def test_commit_that_the_user_checked_out_is_no_problem(repository):
    succeed(repository, "git", "checkout", "-q", "--detach")
    [text] = texts()
    assert text.endswith(", not on a branch")


def test_stash_is_shown(repository):
    (repository / "params.yaml").write_text("a: 2\n")
    succeed(repository, "git", "stash")
    assert "`git stash list` is not empty (1)" in texts()[1]


# --- the user


def test_user_without_a_name_is_reported(monkeypatch):
    assert hints(project_checks.user_and_home) == []
    monkeypatch.setattr(user, "COMPLETED", {"LOGNAME": "12345", "HOME": "/"})
    [line] = hints(project_checks.user_and_home)
    assert line.endswith("so dvc fails: `export LOGNAME=12345 HOME=/`")


def test_home_that_cannot_be_read_is_reported(monkeypatch):
    monkeypatch.setenv("HOME", "/nowhere")
    assert hints(project_checks.user_and_home) == []  # dvc works without it

    def refuse(path: Path) -> None:
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    monkeypatch.setattr(Path, "iterdir", refuse)
    [line] = hints(project_checks.user_and_home)
    assert line.startswith("HOME=/nowhere cannot be read by this user")


# --- training runs

PARAMS = {"train.steps": "100", "train.patience": "2"}


def unfinished(project: Path, losses: list[float], params: dict[str, str] | None = None) -> Path:
    """The folder of a training run that was evaluated every 10 steps."""
    folder = project / ".checkpoints/abc"
    folder.mkdir(parents=True)
    record = Record(id="1", name="mine", started=1, params=PARAMS | (params or {}), tags={})
    write_record(record, folder / "record.json")
    rows = [{"step": 10 * n, "time": n, "val_loss": loss} for n, loss in enumerate(losses, 1)]
    write_history(rows, folder / "history.jsonl")
    return folder


@pytest.mark.parametrize(
    ("losses", "params", "state"),
    [
        ([], {}, "was interrupted"),
        ([5.0, 4.0, 3.0], {}, "was interrupted"),
        ([5.0, 4.0, 4.5], {}, "was interrupted"),
        ([5.0, 4.0, 4.5, 4.6], {}, "has finished"),  # by early stopping
        ([5.0, 4.0, 4.0, 4.0], {}, "has finished"),
        ([5.0, 4.0, 4.5, 4.6], {"train.patience": "None"}, "was interrupted"),
        ([5.0 - n / 10 for n in range(10)], {}, "has finished"),
    ],
)
def test_finished_training_is_not_called_interrupted(project, losses, params, state):
    unfinished(project, losses, params)
    [found] = project_checks.training_runs()
    assert found.text.startswith(f"training run abc {state}: `dvc repro` ")
    assert found.text.endswith(
        "unless its params, the text or the code have changed since it started"
    )


def test_training_that_is_running_is_shown(project):
    folder = unfinished(project, [5.0])
    with lock_for_training(folder):
        [found] = project_checks.training_runs()
    assert found.text == "training run abc is running"


@pytest.mark.parametrize("content", ["", "{", '{"id": "1"', "[]"])
@pytest.mark.parametrize("name", ["record.json", "history.jsonl"])
def test_damaged_file_of_an_unfinished_training_is_reported(project, name, content):
    if (name, content) in (("history.jsonl", ""), ("history.jsonl", "[]")):
        return  # no rows, or lines that are not rows
    folder = unfinished(project, [5.0])
    (folder / name).write_text(content)
    [line] = hints(project_checks.training_runs)
    assert line.endswith(
        f"is missing or damaged: `rm -f {folder / name}`, then run the same command again"
    )
    shutil.rmtree(folder)


@pytest.mark.parametrize(("folder", "stage"), [("training", "train"), ("evaluation", "evaluate")])
def test_damaged_record_of_the_last_run_is_reported(project, folder, stage):
    path = project / "models" / folder / "record.json"
    path.parent.mkdir(parents=True)
    path.write_text('{"id": ')
    [line] = hints(project_checks.training_runs)
    assert "`dvc repro` restores it, otherwise `dvc repro --force " + stage in line
