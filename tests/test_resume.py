"""A killed training goes on where it was, and ends as if it had not been killed."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import mlflow
import pytest
from conftest import run

SETTINGS = {"train.steps": 40, "train.eval_interval": 10, "train.patience": None}


def train(folder: Path) -> subprocess.Popen:
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("DVC_", "MLFLOW_"))}
    return subprocess.Popen(
        [sys.executable, "-m", "stages.train"],
        cwd=folder,
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )


def stop_after_a_checkpoint(folder: Path, notice: signal.Signals) -> tuple[int, str]:
    """Send a training the signal once a checkpoint is there; its exit status and stderr."""
    training = train(folder)
    end = time.monotonic() + 120
    while not list(folder.glob(".checkpoints/*/step-*[0-9]")):
        assert training.poll() is None and time.monotonic() < end
        time.sleep(0.005)
    training.send_signal(notice)
    _, told = training.communicate(timeout=60)
    return training.returncode, told


@pytest.fixture(scope="module")
def undisturbed(make_project) -> Path:
    folder = make_project(SETTINGS)
    assert run(folder, "python", "-m", "stages.prepare").returncode == 0
    assert run(folder, "python", "-m", "stages.train").returncode == 0
    return folder


@pytest.mark.parametrize("notice", [signal.SIGKILL, signal.SIGINT])
def test_resumed_run_equals_uninterrupted_run(make_project, undisturbed, notice):
    folder = make_project(SETTINGS)
    assert run(folder, "python", "-m", "stages.prepare").returncode == 0
    status, told = stop_after_a_checkpoint(folder, notice)
    assert status != 0 and "Traceback" not in told
    resumed = run(folder, "python", "-m", "stages.train")
    assert resumed.returncode == 0 and "going on from the checkpoint of step" in resumed.stdout

    files = [project / "models/gpt2/model.safetensors" for project in (undisturbed, folder)]
    assert files[0].read_bytes() == files[1].read_bytes()
    losses = [
        [
            (row["step"], row["train_loss"], row.get("val_loss"))
            for row in map(json.loads, (p / "models/training/history.jsonl").open())
        ]
        for p in (undisturbed, folder)
    ]
    assert losses[0] == losses[1]

    mlflow.set_tracking_uri(f"sqlite:///{folder / 'mlflow.db'}")
    [kept] = mlflow.search_runs(experiment_names=["folio"], output_format="list")
    assert kept.info.status == "FINISHED"
    points = mlflow.MlflowClient().get_metric_history(kept.info.run_id, "train_loss")
    assert sorted(point.step for point in points) == list(range(1, 41))
    assert not list(folder.glob(".checkpoints/*/*"))


def test_ctrl_c_is_one_line_that_says_how_to_go_on(make_project):
    folder = make_project(SETTINGS)
    assert run(folder, "python", "-m", "stages.prepare").returncode == 0
    status, told = stop_after_a_checkpoint(folder, signal.SIGINT)
    assert status == 130
    assert told.strip().splitlines()[-1].startswith("folio: stopped by Ctrl-C; the same command")
