"""The trials of a planned sweep, up to `dvc exp run`; test_slurm.py trains some."""

import os
from pathlib import Path

import pytest
from conftest import commit, folio, set_params

from folio import commands
from folio.errors import UserError
from folio.run import UNFINISHED, is_training, lock_if_idle
from folio.sweeps.trial import CLONES

PLAN = ("sweep", "train.seed=1,2", "--plan", "--name", "seeds")


@pytest.fixture
def project(make_project) -> Path:
    folder = make_project(store=False)
    commit(folder)
    return folder


def test_plan_is_written_and_the_next_command_printed(project):
    output = folio(project, *PLAN)
    assert output.splitlines()[-1] == "Next: sbatch --array=1-2 deploy/slurm/train.sbatch seeds"
    assert (project / "sweeps/seeds/plan.json").exists()
    with pytest.raises(UserError, match="there is another sweep named 'seeds'"):
        folio(project, "sweep", "train.seed=3", "--plan", "--name", "seeds")
    output = folio(project, "sweep", "train.seed=3", "--plan", "--name", "one")
    assert output.splitlines()[-1] == "Next: sbatch --array=1 deploy/slurm/train.sbatch one"


def test_plan_with_uncommitted_changes_is_refused(project):
    set_params(project, {"train.steps": 7})
    with pytest.raises(UserError, match="clones without your uncommitted changes: commit them"):
        folio(project, *PLAN)


def test_trial_that_does_not_exist_is_one_line(project):
    folio(project, *PLAN)
    with pytest.raises(UserError, match="there is no trial 3 in seeds: 1 to 2"):
        folio(project, "trial", "seeds", "3")
    with pytest.raises(UserError, match="there is no sweep 'other'; available: seeds"):
        folio(project, "trial", "other", "1")


def test_trial_is_trained_by_one_process_at_a_time(project):
    folio(project, *PLAN)
    (project / UNFINISHED).mkdir()
    with (
        lock_if_idle(project / UNFINISHED / "seeds-01") as is_idle,
        pytest.raises(UserError, match="another process is training seeds-01"),
    ):
        assert is_idle
        folio(project, "trial", "seeds", "1")


def test_gc_waits_for_a_trial(project):
    folio(project, *PLAN)
    (project / UNFINISHED).mkdir()
    with (
        lock_if_idle(project / UNFINISHED / "seeds-01"),
        pytest.raises(UserError, match="a training run is going on: wait until it has finished"),
    ):
        folio(project, "gc")


# Instead of dvc: records what `dvc exp run` would find in the clone, and fails.
DVC = """#!/bin/sh
[ "$1 $2" = "exp run" ] || exit 9
{ pwd; echo "$@"; git log -1 --format=%s; ls -d .checkpoints/seeds-02.lock; } > RESULT
{ git status --short .checkpoints; cat data/raw/ü.txt; python -m dvc cache dir; } >> RESULT
exit 1
"""


def test_failed_trial_leaves_no_clone(project, tmp_path, monkeypatch):
    (project / "data/raw/ü.txt").write_text("The sea\n", "utf-8")
    commands.dvc("add", "data/raw/ü.txt", root=project)
    commit(project, "a text that DVC tracks")
    folio(project, *PLAN)
    result = tmp_path / "result"
    (tmp_path / "dvc").write_text(DVC.replace("RESULT", str(result)), "utf-8")
    (tmp_path / "dvc").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    leftover = project / CLONES / "tmp-seeds-02/models"
    leftover.mkdir(parents=True)
    with pytest.raises(UserError, match="seeds-02 has not finished: its output is above"):
        folio(project, "trial", "seeds", "2")
    where, command, subject, lock, text, cache = result.read_text("utf-8").splitlines()
    assert Path(where) == (project / CLONES / "tmp-seeds-02").resolve()
    assert command == "exp run --name seeds-02 --set-param train.seed=2"
    assert (subject, text) == ("a text that DVC tracks", "The sea") and lock
    assert cache == str((project / ".dvc/cache").resolve())
    assert not leftover.parent.exists() and not is_training(project)


def test_finished_trial_is_not_trained_again(project):
    folio(project, *PLAN)
    head = commands.head(project)
    commands.git("update-ref", f"refs/exps/{head[:2]}/{head[2:]}/seeds-01", head, root=project)
    assert folio(project, "trial", "seeds", "1").strip() == "seeds-01 has already finished"
