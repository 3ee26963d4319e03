"""A training that is killed, stopped or damaged goes on, and ends as if nothing had happened."""

import json
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import mlflow
import pytest
from conftest import ROOT, environment, run, run_stages

SETTINGS = {
    "train.steps": 40,
    "train.eval_interval": 10,
    "train.patience": None,
    "runtime.log_interval": 3,
    "runtime.system_metrics": True,
}


def train(folder: Path, *first_on_path: Path) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-m", "stages.train"],
        cwd=folder,
        env=environment(*first_on_path),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )


def stop(folder: Path, notice: signal.Signals, files: str) -> tuple[int, str]:
    """Send a training the signal once such files are there; its exit status and stderr."""
    training = train(folder)
    end = time.monotonic() + 120
    while not list(folder.glob(files)):
        assert training.poll() is None and time.monotonic() < end
        time.sleep(0.005)
    for _ in range(2 if notice == signal.SIGTERM else 1):  # schedulers may say it twice
        training.send_signal(notice)
    notified = time.monotonic()
    _, told = training.communicate(timeout=60)
    assert time.monotonic() - notified < 10
    return training.returncode, told


@pytest.fixture(scope="module")
def prepared(make_project) -> Callable[[], Path]:
    """A function that gives a project in which prepare has run."""
    first = make_project(SETTINGS)
    run_stages(first, "prepare")

    def make() -> Path:
        folder = make_project(SETTINGS)
        shutil.copytree(first / "data", folder / "data", dirs_exist_ok=True)
        return folder

    return make


@pytest.fixture(scope="module")
def undisturbed(prepared) -> Path:
    folder = prepared()
    run_stages(folder, "train")
    return folder


def assert_as_undisturbed(folder: Path, undisturbed: Path) -> None:
    """The training in a folder has ended like the other, and MLflow has one run with all of it."""
    files = [project / "models/gpt2/model.safetensors" for project in (undisturbed, folder)]
    assert files[0].read_bytes() == files[1].read_bytes()
    histories = [
        [json.loads(row) for row in (project / "models/training/history.jsonl").open()]
        for project in (undisturbed, folder)
    ]
    steps = sorted({*range(3, 41, 3), *range(10, 41, 10)})
    for history in histories:
        assert [row["step"] for row in history] == steps
    keys = ("train_loss", "learning_rate", "grad_norm", "val_loss")
    losses = [[[row.get(key) for key in keys] for row in history] for history in histories]
    assert losses[0] == losses[1]

    client = mlflow.MlflowClient(f"sqlite:///{folder / 'mlflow.db'}")
    [kept] = client.search_runs([client.get_experiment_by_name("folio").experiment_id])
    assert kept.info.status == "FINISHED" and "stopped" not in kept.data.tags
    for key in kept.data.metrics:
        points = Counter(p.step for p in client.get_metric_history(kept.info.run_id, key))
        rows = [row["step"] for row in histories[1] if key in row]
        assert points == Counter(rows or [40]), key
    artifacts = {item.path for item in client.list_artifacts(kept.info.run_id)}
    assert artifacts == {"data", "training"}
    [model] = client.search_logged_models([kept.info.experiment_id])
    assert model.status == "READY"


@pytest.mark.parametrize(
    ("notice", "status", "name"),
    [(signal.SIGTERM, 143, "SIGTERM"), (signal.SIGINT, 130, "Ctrl-C")],
)
def test_a_notice_to_stop_saves_the_step_and_says_how_to_go_on(
    prepared, undisturbed, notice, status, name
):
    folder = prepared()
    got, told = stop(folder, notice, ".checkpoints/*/step-*[0-9]")
    last = told.strip().splitlines()[-1]
    assert got == status and "Traceback" not in told
    assert last.startswith(f"folio: stopped by {name}; step ") and "the same command" in last
    newest = max(int(p.name.split("-")[1]) for p in folder.glob(".checkpoints/*/step-*[0-9]"))
    assert f"step {newest} is saved" in last
    client = mlflow.MlflowClient(f"sqlite:///{folder / 'mlflow.db'}")
    [kept] = client.search_runs([client.get_experiment_by_name("folio").experiment_id])
    assert kept.info.status == "KILLED" and name in kept.data.tags["stopped"]

    resumed = run(folder, "python", "-m", "stages.train")
    assert f"going on from the checkpoint of step {newest}" in resumed.stdout
    assert_as_undisturbed(folder, undisturbed)


def test_a_notice_before_the_first_step_leaves_no_traceback(prepared):
    status, told = stop(prepared(), signal.SIGTERM, ".checkpoints/*.lock")
    assert status == 143 and "Traceback" not in told
    assert told.strip().splitlines()[-1].startswith("folio: stopped by SIGTERM; ")


def ends(action: str) -> subprocess.CompletedProcess:
    """A process that sends itself a signal twice in the middle of what is done whole or not."""
    script = f"""
import os, signal
from folio import signals
from folio.errors import one_line_errors
with one_line_errors(), signals.deferred():
    for _ in range(2):
        os.kill(os.getpid(), signal.{action})
    print("the step is done", flush=True)
    signals.check()
"""
    return subprocess.run(
        [sys.executable, "-c", script], env=environment(ROOT), capture_output=True, text=True
    )


def test_a_second_notice_does_not_leave_a_step_half_done():
    done = ends("SIGTERM")
    assert (done.returncode, done.stdout) == (143, "the step is done\n")
    assert done.stderr.startswith("folio: stopped by SIGTERM; ")


def test_a_second_ctrl_c_leaves_at_once_with_the_last_checkpoint():
    done = ends("SIGINT")
    assert (done.returncode, done.stdout) == (130, "")
    assert done.stderr == (
        "folio: stopped by Ctrl-C; the same command goes on from the last checkpoint\n"
    )


def test_what_is_told_to_stop_and_cannot_is_gone_after_some_seconds(tmp_path):
    script = """
from folio import signals
from folio.errors import one_line_errors
signals.GRACE = 1.0
with one_line_errors(), signals.deferred():
    print("ready", flush=True)
    while True:
        pass
"""
    with subprocess.Popen(
        [sys.executable, "-c", script],
        env=environment(ROOT),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as stuck:
        assert stuck.stdout.readline() == "ready\n"
        for _ in range(2):  # a scheduler may say it twice
            stuck.send_signal(signal.SIGTERM)
        _, told = stuck.communicate(timeout=10)
    assert stuck.returncode == 143
    assert told == (
        "folio: stopped by SIGTERM; the same command goes on from the last checkpoint\n"
    )


KILL = """
import importlib, itertools, os, signal, sys
if sys.orig_argv[1:] == ["-m", "stages.train"]:
    from importlib.machinery import PathFinder
    class Finder(PathFinder):
        @classmethod
        def find_spec(cls, name, path=None, target=None):
            spec = super().find_spec(name, path, target)
            if name == {module!r} and spec:
                sound = spec.loader.exec_module
                def exec_module(module):
                    sound(module)
                    owner, calls = module, itertools.count(1)
                    *way, name = {function!r}.split(".")
                    for part in way:
                        owner = getattr(owner, part)
                    function = getattr(owner, name)
                    def killing(*arguments, **options):
                        if next(calls) == {call}:
                            os.kill(os.getpid(), signal.SIGKILL)
                        return function(*arguments, **options)
                    setattr(owner, name, killing)
                spec.loader.exec_module = exec_module
            return spec
    sys.meta_path.insert(0, Finder)
"""

MOMENTS = {
    "in mid-accumulation": ("folio.model", "GPT.loss", 46),
    "inside a checkpoint write": ("folio.checkpoint", "_fsync", 6),
    "just before its end": ("folio.follower", "RunLogger.__exit__", 1),
}


def test_a_training_killed_at_any_moment_ends_as_if_it_had_not_been(
    prepared, undisturbed, tmp_path
):
    folder, killed = prepared(), []
    for moment, (module, function, call) in MOMENTS.items():
        code = KILL.format(module=module, function=function, call=call)
        (tmp_path / "sitecustomize.py").write_text(code)
        training = train(folder, tmp_path)
        _, told = training.communicate(timeout=120)
        assert "Traceback" not in told, told
        killed += [moment] if training.returncode == -signal.SIGKILL else []
    assert killed == [*MOMENTS]
    assert run(folder, "python", "-m", "stages.train").returncode == 0
    assert_as_undisturbed(folder, undisturbed)


def test_a_damaged_checkpoint_is_named_and_costs_nothing_but_time(prepared, undisturbed):
    folder = prepared()
    stop(folder, signal.SIGKILL, ".checkpoints/*/step-*20/sha256")
    newest = max(folder.glob(".checkpoints/*/step-*[0-9]"))
    content = bytearray((newest / "state.safetensors").read_bytes())
    content[len(content) // 2] ^= 1
    (newest / "state.safetensors").write_bytes(content)
    resumed = run(folder, "python", "-m", "stages.train")
    assert f"{newest} is damaged: its checksum does not match; passing it over" in resumed.stderr
    assert_as_undisturbed(folder, undisturbed)
