"""All commands in a project whose path has characters that URLs, patterns and shells interpret."""

import json
import shutil
from pathlib import Path

import pytest
from conftest import folio, inside, run, succeed

from folio.tracking.queries import list_runs
from folio.tracking.store import Store

NAME = "-odd #%&+;[x]*'\\$ `ls` Üé🙂@=,!:|<>()~^ "


def visible_files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if "__pycache__" not in path.parts)


@pytest.fixture(scope="module")
def project(make_trained, tmp_path_factory) -> Path:
    """A project that was moved to a folder of this name after its first run."""
    folder = tmp_path_factory.mktemp("odd") / NAME
    shutil.copytree(make_trained(), folder)
    folio(folder, "sync")
    return folder


def test_experiment_is_recorded_in_the_project(project):
    output = succeed(project, "dvc", "exp", "run", "-S", "train.seed=5")
    assert "MLflow" not in output and "Warning" not in output
    folio_id = json.loads((project / "models/training/run.json").read_text())["folio_id"]
    with inside(project):
        runs = {each.folio_id: each for each in list_runs(Store(None))}
    assert runs[folio_id].status == "FINISHED" and len(runs) == 2
    assert runs[folio_id].tags["mlflow.source.git.commit"]
    assert [path.name for path in project.parent.iterdir()] == [NAME]


def test_commands_work(project):
    assert "MLflow has every run" in succeed(project, "python", "-m", "folio", "sync")
    assert len(folio(project, "compare").splitlines()) > 3
    assert "is now the champion" in folio(project, "promote")
    options = ("--model", "models:/folio@champion", "--tokens", "2")
    assert folio(project, "sample", "The sea", *options).startswith("The sea")
    done = run(project, "python", "-m", "folio", "doctor")
    failures = [line for line in done.stdout.splitlines() if line.startswith("FAIL")]
    assert len(failures) == 1 and "DVC cannot run queued experiments" in failures[0]
    assert [path.name for path in project.parent.iterdir()] == [NAME]


@pytest.mark.parametrize("words", [["sweep", "train.seed=7"], ["variant", "mine", "--queue"]])
def test_queue_is_refused_before_anything_is_written(project, words):
    (project / "variants").mkdir(exist_ok=True)
    (project / "variants/mine.yaml").write_text("train: {seed: 7}\n")
    before = visible_files(project)
    done = run(project, "python", "-m", "folio", *words)
    assert done.returncode == 1 and done.stderr.count("\n") == 1
    assert "queued experiments in a folder whose path contains '#'" in done.stderr
    assert visible_files(project) == before
