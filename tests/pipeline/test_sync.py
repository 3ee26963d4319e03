"""`python -m folio sync` sends to MLflow the runs that are missing there."""

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import mlflow
import pytest
from conftest import commit, environment, folio, run, run_stages, set_params, succeed


def sync(folder: Path) -> str:
    return succeed(folder, "python", "-m", "folio", "sync")


@dataclass
class StoredRun:
    """Everything that a store has of a run."""

    status: str
    name: str
    started: int
    ended: int
    params: dict[str, str]
    points: dict[str, list[tuple[int, int, float]]]  # metric -> (step, time, value)
    artifacts: dict[str, int]  # path -> size
    model: tuple[str, dict[str, str]] | None  # status, tags


def content(uri: str) -> dict[str, StoredRun]:
    """The runs of a store, by folio_id."""
    client, found = mlflow.MlflowClient(uri), {}
    experiment = client.get_experiment_by_name("folio").experiment_id
    models = {
        model.source_run_id: (model.status, model.tags)
        for model in client.search_logged_models([experiment])
    }
    for tracked in client.search_runs([experiment]):
        found[tracked.data.tags["folio_id"]] = StoredRun(
            status=tracked.info.status,
            name=tracked.info.run_name,
            started=tracked.info.start_time,
            ended=tracked.info.end_time,
            params=tracked.data.params,
            points={
                key: sorted(
                    (p.step, p.timestamp, p.value)
                    for p in client.get_metric_history(tracked.info.run_id, key)
                )
                for key in tracked.data.metrics
            },
            artifacts=artifacts(client, tracked.info.run_id),
            model=models.get(tracked.info.run_id),
        )
    return found


def artifacts(client: mlflow.MlflowClient, run_id: str) -> dict[str, int]:
    """The sizes of a run's artifacts, by path."""
    sizes, folders = {}, [None]
    while folders:
        for item in client.list_artifacts(run_id, folders.pop()):
            if item.is_dir:
                folders.append(item.path)
            else:
                sizes[item.path] = item.file_size
    return sizes


def store(folder: Path) -> str:
    """The URI of a copy of a project's store, because MLflow keeps files open."""
    copy = folder / f"mlflow.db.{time.monotonic_ns()}"
    shutil.copy(folder / "mlflow.db", copy)
    return f"sqlite:///{copy}"


def remove_store(folder: Path) -> None:
    (folder / "mlflow.db").unlink()
    shutil.rmtree(folder / "mlruns")


@pytest.fixture(scope="module")
def repo(make_trained) -> Path:
    """A repository with two variants: one committed and pushed, one only in the run cache."""
    folder = make_trained()
    remote = folder.with_name(f"{folder.name}-remote")
    succeed(folder, "dvc", "remote", "add", "--default", "remote", str(remote))
    commit(folder, "remote")
    succeed(folder, "dvc", "push")
    set_params(folder, {"train.seed": 2})
    succeed(folder, "dvc", "repro")
    succeed(folder, "git", "checkout", "-q", ".")
    succeed(folder, "dvc", "checkout")
    return folder


def test_sync_restores_every_point_and_artifact_in_a_clone(repo, tmp_path):
    clone = tmp_path / "clone"
    succeed(tmp_path, "git", "clone", "-q", str(repo), str(clone))
    succeed(clone, "dvc", "pull")
    output = sync(clone)
    assert output.count("sent ") == 2, output
    pulled, original = content(store(clone)), content(store(repo))
    assert len(pulled) == 2 and len(original) == 4
    for folio_id, sent in pulled.items():
        assert sent == original[folio_id]
    evaluation, training = sorted(pulled.values(), key=lambda sent: sent.name != "evaluate")
    plot = (clone / "models/evaluation/loss.png").stat().st_size
    assert training.artifacts["training/loss.png"] == plot  # is sent with the evaluation
    assert evaluation.artifacts["evaluation/loss.png"] == plot
    assert folio(clone, "sync").strip() == "MLflow has every run"
    assert content(store(clone)) == pulled


def test_sync_finds_runs_that_are_only_in_the_run_cache(repo):
    original = content(store(repo))
    remove_store(repo)
    shutil.rmtree(repo / "models")  # sync does not need the workspace
    assert sync(repo).count("sent ") == 4
    assert content(store(repo)) == original
    succeed(repo, "dvc", "checkout")


def test_sync_repairs_the_store_of_a_moved_project(repo, tmp_path):
    moved = tmp_path / "moved here"
    shutil.copytree(repo, moved, symlinks=True)
    set_params(moved, {"evaluate.sample_tokens": 5})
    output = succeed(moved, "dvc", "repro")
    assert "the project has been moved since: `python -m folio sync` updates" in output
    original = content(store(repo))
    assert "sent evaluate" in folio(moved, "sync")
    assert len(content(store(moved))) == len(original) + 1
    client = mlflow.MlflowClient(store(moved))
    for tracked in client.search_runs([client.get_experiment_by_name("folio").experiment_id]):
        path = Path(client.download_artifacts(tracked.info.run_id, ""))
        assert path.is_relative_to(moved) and any(path.iterdir())


def test_sync_names_the_files_that_are_missing_in_the_cache(repo, tmp_path):
    clone = tmp_path / "clone"
    succeed(tmp_path, "git", "clone", "-q", str(repo), str(clone))
    assert "not in DVC's cache: 1 x models/training/record.json" in folio(clone, "sync")
    succeed(clone, "dvc", "pull", "models/training/record.json")
    assert "not in DVC's cache: some files of 1x2x16-" in folio(clone, "sync")


def test_sync_reports_in_one_line_that_the_server_is_down(make_project):
    done = run(
        make_project(), "python", "-m", "folio", "sync", MLFLOW_TRACKING_URI="http://127.0.0.1:9"
    )
    assert done.returncode == 1
    [line] = done.stderr.strip().splitlines()
    assert line.startswith("folio: MLflow failed: ") and line.endswith("; sync again later")


@pytest.fixture
def serve(tmp_path) -> Iterator[Callable[[], subprocess.Popen]]:
    """A function that starts an MLflow server, always with the same store, at `serve.uri`."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    started = []

    def start() -> subprocess.Popen:
        command = ["mlflow", "server", "--host", "127.0.0.1", "--port", str(port)]
        command += ["--workers", "1", "--backend-store-uri", f"sqlite:///{tmp_path / 'server.db'}"]
        command += ["--artifacts-destination", str(tmp_path / "artifacts")]
        with (tmp_path / "server.log").open("a") as log:
            server = subprocess.Popen(
                command, env=environment(), stdout=log, stderr=log, start_new_session=True
            )
        started.append(server)
        end = time.monotonic() + 90
        while socket.socket().connect_ex(("127.0.0.1", port)):
            assert server.poll() is None and time.monotonic() < end, "the server did not start"
            time.sleep(0.1)
        return server

    start.uri = f"http://127.0.0.1:{port}"
    yield start
    for server in started:
        kill(server)


def kill(server: subprocess.Popen) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(server.pid, signal.SIGKILL)
    server.wait()


def wait_until(condition: Callable[[], bool], training: subprocess.Popen) -> None:
    end = time.monotonic() + 120
    while not condition():
        assert training.poll() is None and time.monotonic() < end
        time.sleep(0.05)


def rows(folder: Path) -> int:
    """The number of rows in the history of the unfinished training."""
    return sum(len(p.read_text().splitlines()) for p in folder.glob(".checkpoints/*/history.jsonl"))


def test_sync_sends_what_an_unreliable_server_missed(make_project, serve):
    settings = {"train.steps": 900, "train.eval_interval": 50, "train.patience": None}
    settings |= {"runtime.tracking_uri": serve.uri, "runtime.log_interval": 10}
    folder = make_project(settings)
    run_stages(folder, "prepare")
    command = [sys.executable, "-m", "stages.train"]
    training = subprocess.Popen(
        command, cwd=folder, env=environment(), stderr=subprocess.PIPE, text=True
    )
    wait_until(lambda: rows(folder) >= 5, training)  # the server is not running yet
    training.send_signal(signal.SIGSTOP)
    server = serve()
    training.send_signal(signal.SIGCONT)
    client = mlflow.MlflowClient(serve.uri)
    wait_until(lambda: bool(client.get_experiment_by_name("folio")), training)
    before = rows(folder)
    wait_until(lambda: rows(folder) > before, training)
    kill(server)
    _, stderr = training.communicate(timeout=120)
    assert training.returncode == 0
    assert "MLflow failed, continuing without it" in stderr
    assert stderr.strip().splitlines()[-1].endswith("`python -m folio sync` sends the rest")

    serve()
    assert "sent 1x2x16-" in folio(folder, "sync")
    [trained] = runs = list(content(serve.uri).values())
    history = [json.loads(row) for row in (folder / "models/training/history.jsonl").open()]
    assert trained.status == "FINISHED"
    for key in ("train_loss", "val_loss"):
        expected = [(row["step"], row["time"], row[key]) for row in history if key in row]
        assert trained.points[key] == expected
    assert [row["step"] for row in history] == list(range(10, 901, 10))
    assert "training/history.csv" in trained.artifacts and trained.model[0] == "READY"
    assert folio(folder, "sync").strip() == "MLflow has every run"
    assert list(content(serve.uri).values()) == runs


def test_sync_sends_all_steps_of_an_interrupted_training(make_project):
    folder = make_project({"train.steps": 4000, "train.eval_interval": 50, "train.patience": None})
    run_stages(folder, "prepare")
    command = [sys.executable, "-m", "stages.train"]
    no_server = environment(MLFLOW_TRACKING_URI="http://127.0.0.1:9")
    training = subprocess.Popen(command, cwd=folder, env=no_server, stderr=subprocess.DEVNULL)
    wait_until(lambda: rows(folder) >= 50, training)
    assert (
        folio(folder, "sync").strip() == "MLflow has every run"
    )  # except for the one that is still training
    training.kill()
    training.wait()
    assert "interrupted after step" in folio(folder, "sync")
    [interrupted] = content(store(folder)).values()
    assert interrupted.status == "KILLED"
    steps = [step for step, *_ in interrupted.points["train_loss"]]
    assert steps == list(range(1, rows(folder) + 1))
