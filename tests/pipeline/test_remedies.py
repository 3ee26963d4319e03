"""What `doctor` says about a damaged project is true, and following it leaves nothing to report."""

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import environment, run, set_params, succeed

from folio.run import RECORD


def doctor(folder: Path) -> list[str]:
    """The problems that doctor reports."""
    done = run(folder, "python", "-m", "folio", "doctor")
    problems = [line for line in done.stdout.splitlines() if line.startswith("FAIL")]
    assert done.returncode == bool(problems) and "Traceback" not in done.stderr
    return problems


def follow(folder: Path, problem: str) -> None:
    """Run the commands in a line of doctor, in turn."""
    for command in re.findall(r"`([^`]+)`", problem.partition(", otherwise ")[0]):
        succeed(folder, "sh", "-ec", command)


def cut(path: Path) -> None:
    """Cut a file in half, but not the one in DVC's cache, to which it may be linked."""
    content = path.read_bytes()
    path.unlink()
    path.write_bytes(content[: len(content) // 2 - 1])


def empty(path: Path) -> None:
    """Replace a file by an empty one, which is not a link to the one in DVC's cache."""
    path.unlink()
    path.write_text("")
    os.utime(path, (0, 0))


def become_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def become_file(path: Path) -> None:
    shutil.rmtree(path, ignore_errors=True)
    path.write_text("not a folder")


# What is damaged in a project at the same time: the path, how, and words of what doctor says.
Damage = tuple[str, Callable[[Path], object], str]
PROJECTS: dict[str, list[Damage]] = {
    "cut or empty": [
        (".dvc/tmp/rwlock", lambda path: path.write_text('{"write": {'), "rwlock is damaged"),
        ("dvc.lock", cut, "dvc.lock is damaged"),
        ("mlflow.db", empty, "mlflow.db is empty"),
        ("models/training/record.json", cut, "training/record.json is missing or damaged"),
        ("models/evaluation/record.json", empty, "evaluation/record.json is missing or damaged"),
    ],
    "files in place of folders": [
        (name, become_file, f"{name} is a file where Folio needs a folder")
        for name in ("models/training", "data/prepared", ".checkpoints", "mlruns")
    ],
    "a file in place of the cache": [
        (".dvc/cache", become_file, ".dvc/cache is a file where Folio needs a folder"),
    ],
    "files and folders in each other's place": [
        (".dvc/tmp", become_file, ".dvc/tmp is a file where Folio needs a folder"),
        ("models", become_file, "models is a file where Folio needs a folder"),
        ("mlflow.db", become_folder, "mlflow.db is a folder, but MLflow needs a file"),
    ],
}


@pytest.mark.parametrize("project", PROJECTS)
def test_remedies_of_doctor_work(make_trained, project):
    folder = make_trained()
    for name, damage, _ in PROJECTS[project]:
        damage(folder / name)
    problems = doctor(folder)
    for _, _, words in PROJECTS[project]:
        assert len([line for line in problems if words in line]) == 1, (words, problems)
    for _ in range(3):  # one problem may hide another
        for problem in problems:
            follow(folder, problem)
        problems = doctor(folder)
        if not problems:
            break
    assert problems == []
    succeed(folder, "dvc", "repro")
    assert "up to date" in succeed(folder, "dvc", "status")
    assert "MLflow has every run" in succeed(folder, "python", "-m", "folio", "sync")


EXPERIMENT = ["dvc", "exp", "run", "-S", "train.seed=77", "-S", "train.steps=3000"]
EXPERIMENT += ["-S", "train.eval_interval=50", "-S", "train.patience=null"]


def kill_experiment(folder: Path, number: signal.Signals) -> None:
    """Send a signal to the processes of an experiment that has saved a checkpoint."""
    process = subprocess.Popen(
        EXPERIMENT,
        cwd=folder,
        env=environment(),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    end = time.monotonic() + 120
    while not list(folder.glob(".checkpoints/*/step-*[0-9]")):
        assert process.poll() is None and time.monotonic() < end
        time.sleep(0.05)
    os.killpg(process.pid, number)
    process.wait()
    time.sleep(2)  # until the trainer has saved


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGHUP])
def test_way_back_from_a_killed_experiment_restores_params_model_and_branch(make_trained, number):
    folder = make_trained()
    before = (folder / "params.yaml").read_text()
    branch = succeed(folder, "git", "symbolic-ref", "HEAD")
    (folder / "data/raw/new.txt").write_text("not committed\n")  # the experiment stages it
    kill_experiment(folder, number)
    assert "seed: 77" in (folder / "params.yaml").read_text()
    succeed(folder, "git", "checkout", "-q", ".")
    assert "seed: 77" in (folder / "params.yaml").read_text()  # why another way is needed

    [line] = doctor(folder)
    assert "a `dvc exp run` was killed: HEAD is detached, and params.yaml may have" in line
    succeed(folder, "sh", "-ec", re.findall(r"`([^`]+)`", line)[1])
    assert (folder / "params.yaml").read_text() == before
    assert succeed(folder, "git", "symbolic-ref", "HEAD") == branch
    assert (folder / "data/raw/new.txt").read_text() == "not committed\n"
    assert (folder / "models/gpt2/model.safetensors").exists()
    assert doctor(folder) == []


def test_damaged_record_of_an_interrupted_training_is_reported_and_its_remedy_works(make_trained):
    folder = make_trained()
    set_params(folder, {"train.steps": 2000, "train.eval_interval": 50, "train.patience": None})
    training = subprocess.Popen(
        [sys.executable, "-m", "stages.train"], cwd=folder, env=environment()
    )
    end = time.monotonic() + 120
    while not list(folder.glob(".checkpoints/*/step-*[0-9]")):
        assert training.poll() is None and time.monotonic() < end
        time.sleep(0.05)
    training.kill()
    training.wait()
    [record] = folder.glob(f".checkpoints/*/{RECORD}")
    empty(record)
    assert "record.json is missing or damaged" in succeed(folder, "python", "-m", "folio", "sync")
    failed = run(folder, "python", "-m", "stages.train")
    assert failed.returncode == 1 and "Traceback" not in failed.stderr
    [line] = [line for line in doctor(folder) if "record.json" in line]
    follow(folder, line)
    done = run(folder, "python", "-m", "stages.train")
    assert done.returncode == 0 and "resuming from the checkpoint of step" in done.stdout
