"""git and dvc: each failure has its own cause and remedy, and none is taken for another one."""

import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import ROOT, commit, inside, run, succeed

from folio import commands
from folio.errors import UserError
from folio.sweeps import variants
from folio.sweeps.plan import make_plan
from folio.tracking import context
from folio.tracking.dvc_cache import DvcCache


@pytest.fixture
def repository(tmp_path) -> Path:
    """A git repository with one commit."""
    folder = tmp_path / "repository"
    folder.mkdir()
    (folder / "file.txt").write_text("text\n")
    commit(folder)
    return folder


def belong_to_another_user(folder: Path) -> None:
    os.environ["GIT_TEST_ASSUME_DIFFERENT_OWNER"] = "1"  # git's own switch for such a test


def branch(folder: Path) -> Path:
    return folder / ".git" / succeed(folder, "git", "symbolic-ref", "HEAD").strip()


# How a repository is damaged, and words of the error, which contains the remedy.
FAILURES: dict[str, tuple[Callable[[Path], None], str]] = {
    "another user's": (
        belong_to_another_user,
        r"dubious ownership.*; `git config --global --add safe.directory .*repository`",
    ),
    "no repository": (
        lambda folder: shutil.rmtree(folder / ".git"),
        "no git repository here: `git init && git add -A && git commit -m start`",
    ),
    "no commit": (
        lambda folder: branch(folder).unlink(),
        "no git commit yet: `git add -A && git commit -m start`",
    ),
    "empty branch": (lambda folder: branch(folder).write_text(""), "appears to be broken"),
    "empty HEAD": (
        lambda folder: (folder / ".git/HEAD").write_text(""),
        r"git does not recognize .*\.git: make it readable or, if it is damaged, clone",
    ),
    "lost commit": (lambda folder: branch(folder).write_text("1" * 40 + "\n"), "bad object HEAD"),
    "damaged settings": (
        lambda folder: (folder / ".git/config").write_text("[core\n"),
        "bad config line",
    ),
    "lost worktree": (
        lambda folder: (shutil.rmtree(folder / ".git"), (folder / ".git").write_text("gitdir: /x")),
        "not a git repository: /x",
    ),
}


@pytest.fixture(params=FAILURES)
def failure(request, repository, monkeypatch) -> tuple[Path, str]:
    """A damaged repository, and the error that everything that uses it should report."""
    monkeypatch.setenv("GIT_TEST_ASSUME_DIFFERENT_OWNER", "0")
    damage, words = FAILURES[request.param]
    damage(repository)
    return repository, words


def test_head_reports_the_cause_and_the_remedy(failure):
    folder, words = failure
    with pytest.raises(UserError, match=words) as error:
        commands.head(folder)
    assert "\n" not in str(error.value)
    assert isinstance(error.value, commands.NoCommitError) == ("git add -A" in words)


def test_plan_of_a_sweep_reports_the_cause_and_the_remedy(failure):
    folder, words = failure
    with inside(folder), pytest.raises(UserError, match=words):
        make_plan([{"train.seed": 1}], {}, None)


def test_variant_reports_the_cause_and_the_remedy(failure, monkeypatch):
    folder, words = failure
    shutil.copy(ROOT / "params.yaml", folder)
    shutil.copytree(ROOT / "variants", folder / "variants")
    monkeypatch.setattr(os, "execvp", lambda *_: pytest.fail("dvc was started"))
    with inside(folder), pytest.raises(UserError, match=words):
        variants.train("quick-30m")


def test_cache_reads_no_lock_file_of_a_repository_that_git_refuses(failure):
    folder, words = failure
    if "git add -A" in words:
        assert DvcCache(folder).entries() == []
    else:
        with pytest.raises(UserError, match=words):
            DvcCache(folder).entries()


def test_training_without_its_commit_is_reported(failure, capsys):
    folder, words = failure
    with inside(folder):
        context.tags("stages/train.py")
    error = capsys.readouterr().err
    if "git add -A" in words:  # the user knows that there is no commit
        assert error == ""
    elif error:  # MLflow reads some of these repositories itself
        assert error.startswith("MLflow will not have this run's git commit: git ")


def test_make_git_reports_the_cause_and_the_remedy(failure):
    folder, _ = failure
    shutil.copy(ROOT / "Makefile", folder)
    own = run(folder, "git", "rev-parse", "--git-dir", **_switch())
    done = run(folder, "make", "--no-print-directory", "git", **_switch())
    assert (done.returncode == 0) == (own.returncode == 0)
    if "not a git repository (or any" in own.stderr:
        assert "DVC needs a git repository: git init" in done.stdout
    else:
        assert done.stdout == own.stderr  # git's own words, with its remedy


def _switch() -> dict[str, str]:
    name = "GIT_TEST_ASSUME_DIFFERENT_OWNER"
    return {name: os.environ[name]}


def test_remedy_for_another_users_repository_works(repository, tmp_path, monkeypatch):
    monkeypatch.setenv("GIT_TEST_ASSUME_DIFFERENT_OWNER", "1")
    monkeypatch.setenv("HOME", str(tmp_path))
    with pytest.raises(UserError) as error:
        commands.head(repository)
    remedy = str(error.value).split("`")[1]
    subprocess.run(["sh", "-ec", remedy], check=True)
    assert len(commands.head(repository)) == 40


def test_missing_git_is_reported(repository, monkeypatch):
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(UserError, match="git is not on the PATH: install it"):
        commands.git("status", root=repository)


def test_cache_of_a_folder_without_dvc_is_empty_but_other_failures_of_dvc_are_reported(tmp_path):
    assert DvcCache(tmp_path).entries() == []
    succeed(tmp_path, "git", "init", "-q")
    succeed(tmp_path, "dvc", "init", "-q")
    (tmp_path / ".dvc/config").write_text("[core\n")
    with pytest.raises(UserError, match="`dvc cache dir` failed: ") as error:
        DvcCache(tmp_path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("output", "error"),
    [
        ("ERROR: no\n\nHaving any troubles?", "no"),
        (
            "WARNING: x\nERROR: busy, blocked by:\n  (PID 5): dvc\n",
            "busy, blocked by: (PID 5): dvc",
        ),
        ("Traceback\nKeyError: 1\n", "KeyError: 1; `python -m folio doctor` may find the cause"),
        (
            "'./dvc.yaml' is invalid.\n\nExpected a colon, in line 3\n  3   x: [",
            "'./dvc.yaml' is invalid. Expected a colon, in line 3: fix it, or"
            " `git checkout HEAD -- dvc.yaml`",
        ),
        ("", "no reason given; `python -m folio doctor` may find the cause"),
    ],
)
def test_error_of_dvc_is_one_line(output, error):
    assert commands.dvc_error(output) == error
