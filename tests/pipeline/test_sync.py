"""`python -m folio sync` brings to MLflow whatever it lacks, from what DVC keeps."""

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import mlflow
import pytest
from conftest import commit, environment, folio, run, run_stages, set_params, succeed


def sync(folder: Path) -> str:
    return succeed(folder, "python", "-m", "folio", "sync")


def content(address: str) -> dict[str, tuple]:
    """All that a store has of each run, by its folio_id: status, params, points, files, model."""
    client, found = mlflow.MlflowClient(address), {}
    experiment = client.get_experiment_by_name("folio").experiment_id
    models = {
        model.source_run_id: (model.status, model.tags)
        for model in client.search_logged_models([experiment])
    }
    for kept in client.search_runs([experiment]):
        points = {
            key: sorted(
                (p.step, p.timestamp, p.value)
                for p in client.get_metric_history(kept.info.run_id, key)
            )
            for key in kept.data.metrics
        }
        artifacts, folders = {}, [None]
        while folders:
            for item in client.list_artifacts(kept.info.run_id, folders.pop()):
                if item.is_dir:
                    folders.append(item.path)
                else:
                    artifacts[item.path] = item.file_size
        times = (kept.info.start_time, kept.info.end_time)
        found[kept.data.tags["folio_id"]] = (
            kept.info.status,
            kept.info.run_name,
            times,
            kept.data.params,
            points,
            artifacts,
            models.get(kept.info.run_id),
        )
    return found


def store(folder: Path) -> str:
    """The address of a project's store, as it is now: MLflow holds on to files it has opened."""
    now = folder / f"mlflow.db.{time.monotonic_ns()}"
    shutil.copy(folder / "mlflow.db", now)
    return f"sqlite:///{now}"


def forget(folder: Path) -> None:
    """Take a project's store away."""
    (folder / "mlflow.db").unlink()
    shutil.rmtree(folder / "mlruns")


@pytest.fixture(scope="module")
def repo(make_trained) -> Path:
    """A repository with two variants: one committed and pushed, one in the run cache alone."""
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


def test_a_clone_finds_every_point_and_artifact_after_a_pull_and_a_sync(repo, tmp_path):
    clone = tmp_path / "clone"
    succeed(tmp_path, "git", "clone", "-q", str(repo), str(clone))
    succeed(clone, "dvc", "pull")
    told = sync(clone)
    assert told.count("sent ") == 2, told
    pulled, original = content(store(clone)), content(store(repo))
    assert len(pulled) == 2 and len(original) == 4
    for folio_id, kept in pulled.items():
        assert kept == original[folio_id]
    assert folio(clone, "sync").strip() == "MLflow has every run"
    assert content(store(clone)) == pulled


def test_what_only_the_run_cache_has_is_found_too(repo):
    original = content(store(repo))
    forget(repo)
    shutil.rmtree(repo / "models")  # the workspace is not needed for it
    assert sync(repo).count("sent ") == 4
    assert content(store(repo)) == original
    succeed(repo, "dvc", "checkout")


def test_a_moved_project_is_mended_and_goes_on(repo, tmp_path):
    moved = tmp_path / "moved here"
    shutil.copytree(repo, moved, symlinks=True)
    set_params(moved, {"evaluate.sample_tokens": 5})
    told = succeed(moved, "dvc", "repro")
    assert "the project has been moved since: `python -m folio sync` mends" in told
    original = content(store(repo))
    assert "sent evaluate" in folio(moved, "sync")
    mended = content(store(moved))
    assert len(mended) == len(original) + 1
    client = mlflow.MlflowClient(store(moved))
    for kept in client.search_runs([client.get_experiment_by_name("folio").experiment_id]):
        place = Path(client.download_artifacts(kept.info.run_id, ""))
        assert place.is_relative_to(moved) and any(place.iterdir())


def test_sync_names_what_the_cache_lacks(repo, tmp_path):
    clone = tmp_path / "clone"
    succeed(tmp_path, "git", "clone", "-q", str(repo), str(clone))
    assert "not in DVC's cache: 1 x models/training/record.json" in folio(clone, "sync")
    succeed(clone, "dvc", "pull", "models/training/record.json")
    assert "not in DVC's cache: 1x2x16-" in folio(clone, "sync")


def test_sync_says_in_one_line_that_the_store_is_away(make_project):
    done = run(
        make_project(), "python", "-m", "folio", "sync", MLFLOW_TRACKING_URI="http://127.0.0.1:9"
    )
    assert done.returncode == 1
    [line] = done.stderr.strip().splitlines()
    assert line.startswith("folio: MLflow did not take this: ") and "run it again" in line


@pytest.fixture
def serve(tmp_path) -> Iterator[Callable[[], subprocess.Popen]]:
    """A function that starts one and the same MLflow server; serve.address is where."""
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

    start.address = f"http://127.0.0.1:{port}"
    yield start
    for server in started:
        kill(server)


def kill(server: subprocess.Popen) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(server.pid, signal.SIGKILL)
    server.wait()


def wait_for(happened: Callable[[], bool], training: subprocess.Popen) -> None:
    end = time.monotonic() + 120
    while not happened():
        assert training.poll() is None and time.monotonic() < end
        time.sleep(0.05)


def rows(folder: Path) -> int:
    return sum(len(p.read_text().splitlines()) for p in folder.glob(".checkpoints/*/history.jsonl"))


def test_a_server_away_before_in_the_middle_and_at_the_end_loses_nothing(make_project, serve):
    settings = {"train.steps": 900, "train.eval_interval": 50, "train.patience": None}
    settings |= {"runtime.tracking_uri": serve.address, "runtime.log_interval": 10}
    folder = make_project(settings)
    run_stages(folder, "prepare")
    command = [sys.executable, "-m", "stages.train"]
    training = subprocess.Popen(
        command, cwd=folder, env=environment(), stderr=subprocess.PIPE, text=True
    )
    wait_for(lambda: rows(folder) >= 5, training)  # without a server
    training.send_signal(signal.SIGSTOP)
    server = serve()
    training.send_signal(signal.SIGCONT)
    client = mlflow.MlflowClient(serve.address)
    wait_for(lambda: bool(client.get_experiment_by_name("folio")), training)
    before = rows(folder)
    wait_for(lambda: rows(folder) > before, training)
    kill(server)
    _, told = training.communicate(timeout=120)
    assert training.returncode == 0
    assert "going on without it" in told
    assert told.strip().splitlines()[-1].endswith("`python -m folio sync` sends it")

    serve()
    assert "sent 1x2x16-" in folio(folder, "sync")
    [kept] = sent = list(content(serve.address).values())
    history = [json.loads(row) for row in (folder / "models/training/history.jsonl").open()]
    status, *_, points, artifacts, model = kept
    assert status == "FINISHED"
    for key in ("train_loss", "val_loss"):
        told_rows = [(row["step"], row["time"], row[key]) for row in history if key in row]
        assert points[key] == told_rows
    assert [row["step"] for row in history] == list(range(10, 901, 10))
    assert "training/loss.png" in artifacts and model[0] == "READY"
    assert folio(folder, "sync").strip() == "MLflow has every run"
    assert list(content(serve.address).values()) == sent


def test_a_training_that_was_cut_short_is_shown_as_far_as_it_got(make_project):
    folder = make_project({"train.steps": 4000, "train.eval_interval": 50, "train.patience": None})
    run_stages(folder, "prepare")
    command = [sys.executable, "-m", "stages.train"]
    away = environment(MLFLOW_TRACKING_URI="http://127.0.0.1:9")
    training = subprocess.Popen(command, cwd=folder, env=away, stderr=subprocess.DEVNULL)
    wait_for(lambda: rows(folder) >= 50, training)
    assert folio(folder, "sync").strip() == "MLflow has every run"  # but for the one at work
    training.kill()
    training.wait()
    assert "cut short after step" in folio(folder, "sync")
    [kept] = content(store(folder)).values()
    assert kept[0] == "KILLED"
    assert Counter(step for step, *_ in kept[4]["train_loss"]) == Counter(
        range(1, rows(folder) + 1)
    )
