"""A training that is killed, stopped or damaged resumes, and ends as an uninterrupted one."""

import json
import shutil
import signal
import subprocess
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import mlflow
import pytest
from conftest import environment, run, run_stages, set_params, warm_environment

SETTINGS = {
    "train.steps": 40,
    "train.eval_interval": 10,
    "train.patience": None,
    "runtime.log_interval": 3,
    "runtime.system_metrics": True,
}


def train(folder: Path, *first_on_path: Path, warm: bool = False) -> subprocess.Popen:
    return subprocess.Popen(
        ["python", "-m", "stages.train"],
        cwd=folder,
        env=(warm_environment if warm else environment)(*first_on_path),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )


def stop(folder: Path, number: signal.Signals, files: str, warm: bool = False) -> tuple[int, str]:
    """Send a training the signal once the files exist; return its exit status and stderr."""
    training = train(folder, warm=warm)
    end = time.monotonic() + 120
    while not list(folder.glob(files)):
        assert training.poll() is None and time.monotonic() < end
        time.sleep(0.005)
    for _ in range(2 if number == signal.SIGTERM else 1):  # schedulers may send it twice
        training.send_signal(number)
    sent = time.monotonic()
    _, stderr = training.communicate(timeout=60)
    assert time.monotonic() - sent < 10
    return training.returncode, stderr


@pytest.fixture(scope="module")
def prepared(make_project) -> Callable[[], Path]:
    """A function that returns a new project in which prepare has run."""
    first = make_project(SETTINGS)
    run_stages(first, "prepare")

    def make() -> Path:
        folder = make_project(SETTINGS)
        shutil.copytree(first / "data", folder / "data", dirs_exist_ok=True)
        return folder

    return make


@pytest.fixture(scope="module")
def uninterrupted(prepared) -> Path:
    folder = prepared()
    run_stages(folder, "train")
    return folder


def assert_equals_uninterrupted(folder: Path, uninterrupted: Path, last: int = 40) -> None:
    """Both trainings ended with the same weights and history, and MLflow has one complete run."""
    files = [project / "models/gpt2/model.safetensors" for project in (uninterrupted, folder)]
    assert files[0].read_bytes() == files[1].read_bytes()
    histories = [
        [json.loads(row) for row in (project / "models/training/history.jsonl").open()]
        for project in (uninterrupted, folder)
    ]
    steps = sorted({*range(3, last + 1, 3), *range(10, last + 1, 10)})
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
        assert points == Counter(rows or [last]), key
    artifacts = {item.path for item in client.list_artifacts(kept.info.run_id)}
    assert artifacts == {"data", "training"}
    [model] = client.search_logged_models([kept.info.experiment_id])
    assert model.status == "READY"


@pytest.mark.parametrize(
    ("number", "status", "name"),
    [
        (signal.SIGTERM, 143, "SIGTERM"),
        (signal.SIGINT, 130, "Ctrl-C"),
        (signal.SIGHUP, 129, "SIGHUP"),
        (signal.SIGUSR1, 138, "SIGUSR1"),
    ],
)
def test_signal_saves_the_step_and_prints_how_to_resume(
    prepared, uninterrupted, number, status, name
):
    folder = prepared()
    got, stderr = stop(folder, number, ".checkpoints/*/step-*[0-9]")
    last = stderr.strip().splitlines()[-1]
    assert got == status and "Traceback" not in stderr
    assert last.startswith(f"folio: stopped by {name}; step ") and "the same command" in last
    newest = max(int(p.name.split("-")[1]) for p in folder.glob(".checkpoints/*/step-*[0-9]"))
    assert f"step {newest} is saved" in last
    client = mlflow.MlflowClient(f"sqlite:///{folder / 'mlflow.db'}")
    [kept] = client.search_runs([client.get_experiment_by_name("folio").experiment_id])
    assert kept.info.status == "KILLED" and name in kept.data.tags["stopped"]

    resumed = run(folder, "python", "-m", "stages.train")
    assert f"resuming from the checkpoint of step {newest}" in resumed.stdout
    assert_equals_uninterrupted(folder, uninterrupted)


def test_signal_before_first_step_leaves_no_traceback(prepared):
    status, stderr = stop(prepared(), signal.SIGTERM, ".checkpoints/*.lock")
    assert status == 143 and "Traceback" not in stderr
    assert stderr.strip().splitlines()[-1].startswith("folio: stopped by SIGTERM; ")


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
    "in mid-accumulation": ("folio.gpt.model", "GPT.loss", 46),
    "inside a checkpoint write": ("folio.training.checkpoint", "_fsync", 6),
    "just before its end": ("folio.tracking.logger", "RunLogger.__exit__", 1),
}


def test_killed_training_resumes_bit_for_bit(prepared, uninterrupted, tmp_path):
    folder, killed = prepared(), []
    for moment, (module, function, call) in MOMENTS.items():
        code = KILL.format(module=module, function=function, call=call)
        (tmp_path / "sitecustomize.py").write_text(code)
        training = train(folder, tmp_path)
        _, stderr = training.communicate(timeout=120)
        assert "Traceback" not in stderr, stderr
        killed += [moment] if training.returncode == -signal.SIGKILL else []
    assert killed == [*MOMENTS]
    assert run(folder, "python", "-m", "stages.train").returncode == 0
    assert_equals_uninterrupted(folder, uninterrupted)


def test_damaged_checkpoint_is_reported_and_changes_no_result(prepared, uninterrupted):
    folder = prepared()
    stop(folder, signal.SIGKILL, ".checkpoints/*/step-*20/sha256")
    newest = max(folder.glob(".checkpoints/*/step-*[0-9]"))
    content = bytearray((newest / "state.safetensors").read_bytes())
    content[len(content) // 2] ^= 1
    (newest / "state.safetensors").write_bytes(content)
    resumed = run(folder, "python", "-m", "stages.train")
    assert f"{newest} is damaged: its checksum does not match; skipping it" in resumed.stderr
    assert_equals_uninterrupted(folder, uninterrupted)


def damage(checkpoint: Path) -> None:
    content = bytearray((checkpoint / "state.safetensors").read_bytes())
    content[len(content) // 2] ^= 1
    (checkpoint / "state.safetensors").write_bytes(content)


def remove_checkpoints(newest: Path) -> None:
    for checkpoint in newest.parent.glob("step-*"):
        shutil.rmtree(checkpoint)


# How the steps after a checkpoint come to be repeated.
REPEATS = {
    "newest checkpoint damaged": damage,
    "newest checkpoint removed": shutil.rmtree,
    "all checkpoints removed": remove_checkpoints,
}


@pytest.mark.parametrize(
    ("repeat", "interval"),
    [
        ("newest checkpoint damaged", 3),
        ("newest checkpoint damaged", 50),
        ("newest checkpoint removed", 7),
        ("all checkpoints removed", 3),
    ],
)
def test_mlflow_and_the_history_have_the_same_points_after_steps_were_repeated(
    prepared, uninterrupted, repeat, interval
):
    """Whatever runtime.log_interval is when training resumes."""
    folder = prepared()
    set_params(folder, {"runtime.log_interval": 4})
    stop(folder, signal.SIGTERM, ".checkpoints/*/step-*20/sha256", warm=True)
    REPEATS[repeat](max(folder.glob(".checkpoints/*/step-*[0-9]")))
    set_params(folder, {"runtime.log_interval": interval})
    assert run(folder, "python", "-m", "stages.train").returncode == 0

    files = [project / "models/gpt2/model.safetensors" for project in (uninterrupted, folder)]
    assert files[0].read_bytes() == files[1].read_bytes()
    history = [json.loads(row) for row in (folder / "models/training/history.jsonl").open()]
    steps = [row["step"] for row in history]
    assert steps == sorted(set(steps)) and {10, 20, 30, 40} <= {*steps}
    client = mlflow.MlflowClient(f"sqlite:///{folder / 'mlflow.db'}")
    [kept] = client.search_runs([client.get_experiment_by_name("folio").experiment_id])
    for key in kept.data.metrics:
        points = client.get_metric_history(kept.info.run_id, key)
        rows = [(row["step"], row["time"], row[key]) for row in history if key in row]
        sent = [(point.step, point.timestamp, point.value) for point in points]
        assert sorted(sent) == rows or (not rows and len(sent) == 1), key
