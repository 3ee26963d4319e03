"""`python -m folio sync` sends to MLflow the runs that are missing there."""

import contextlib
import json
import os
import shutil
import signal
import socket
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import mlflow
import pytest
from conftest import (
    commit,
    environment,
    folio,
    inside,
    run,
    run_stages,
    set_params,
    succeed,
    warm_environment,
)

from folio.app import models as app_models
from folio.errors import UserError
from folio.run import read_evaluation, read_training
from folio.tracking import logged_models, queries
from folio.tracking.store import Store


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
    model: tuple | None  # name, status, checksum of the weights, params, linked metrics


def content(uri: str) -> dict[str, StoredRun]:
    """The runs of a store, by folio_id."""
    client, found = mlflow.MlflowClient(uri), {}
    experiment = client.get_experiment_by_name("folio").experiment_id
    models = {
        model.source_run_id: (
            model.name,
            model.status,
            model.tags["weights_sha256"],
            model.params,
            sorted((p.key, p.step, p.timestamp, p.value) for p in model.metrics or []),
        )
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


def ranking(folder: Path, metric: str) -> list[tuple[str, float]]:
    """The names of the models in the store, as MLflow ranks them by a metric, and its values."""
    client = mlflow.MlflowClient(store(folder))
    experiment = client.get_experiment_by_name("folio").experiment_id
    order = [{"field_name": f"metrics.{metric}"}]
    return [
        (model.name, logged_models.linked_metrics(model)[metric])
        for model in client.search_logged_models([experiment], order_by=order)
    ]


@pytest.mark.parametrize("metric", ["kept_val_loss", "evaluate/val_loss"])
def test_mlflow_ranks_the_models_by_loss_and_they_have_the_names_of_their_runs(repo, metric):
    trained = [run for run in content(store(repo)).values() if run.name != "evaluate"]
    expected = sorted((run.points[metric][-1][2], run.name) for run in trained)
    assert len({name for _, name in expected}) == 2
    assert ranking(repo, metric) == [(name, loss) for loss, name in expected]


def test_sync_links_the_metrics_of_models_that_an_earlier_version_logged(repo):
    before = content(store(repo))
    with contextlib.closing(sqlite3.connect(repo / "mlflow.db")) as database:
        for table in ("logged_model_metrics", "logged_model_params"):
            assert database.execute(f"DELETE FROM {table}").rowcount > 10
        database.commit()
    assert content(store(repo)) != before
    assert sync(repo).count(" again: parts were missing from MLflow") == 2
    assert content(store(repo)) == before
    assert sync(repo).strip() == "MLflow has every run"


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
    output = folio(clone, "sync")
    assert "not in DVC's cache: models/" in output and " of 1x2x16-" in output


def test_sync_reports_in_one_line_that_the_server_is_down(make_project):
    done = run(
        make_project(), "python", "-m", "folio", "sync", MLFLOW_TRACKING_URI="http://127.0.0.1:9"
    )
    assert done.returncode == 1
    [line] = done.stderr.strip().splitlines()
    assert line.startswith("folio: MLflow failed: ") and line.endswith("; sync again later")


@pytest.fixture
def serve(tmp_path, server_store) -> Iterator[Callable[[], subprocess.Popen]]:
    """A function that starts an MLflow server, always with the same store, at `serve.uri`."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    started = []
    shutil.copy(server_store, tmp_path / "server.db")

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
    assert "training/history.csv" in trained.artifacts and trained.model[1] == "READY"
    assert folio(folder, "sync").strip() == "MLflow has every run"
    assert list(content(serve.uri).values()) == runs


def test_sync_sends_again_what_a_server_has_lost(make_trained, serve, tmp_path, monkeypatch):
    folder = make_trained(store=False)
    serve()
    set_params(folder, {"runtime.tracking_uri": serve.uri})
    assert folio(folder, "sync").count("sent ") == 2
    before = content(serve.uri)
    assert folio(folder, "sync").strip() == "MLflow has every run"
    places = tmp_path / "artifacts"
    [weights] = places.rglob("model.safetensors")
    [samples] = places.rglob("samples.md")
    for lost in (places, weights.parents[2] / "code", samples.parent, weights):
        shutil.rmtree(lost) if lost.is_dir() else lost.unlink()
        assert " again: " in folio(folder, "sync"), lost
        assert content(serve.uri) == before
        assert folio(folder, "sync").strip() == "MLflow has every run"
    damaged = weights.read_bytes()[:-99] + bytes(99)
    weights.write_bytes(damaged)  # listings do not show this; fetching the model does
    with pytest.raises(UserError, match=r"are missing or damaged in MLflow"):
        folio(folder, "promote")
    assert " again: " in folio(folder, "sync") and weights.read_bytes() != damaged
    assert folio(folder, "promote").endswith("is now the champion: there was none before\n")


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


def evaluation_metrics(folder: Path) -> dict[str, float]:
    metrics = json.loads((folder / "models/evaluation/metrics.json").read_text())
    return {f"evaluate/{name}": value for name, value in metrics.items()}


def shown(folder: Path) -> tuple[dict[str, float], dict[str, str]]:
    """The evaluation that MLflow shows on the training run of the workspace, and on its model:
    metrics, tags."""
    with inside(folder):
        store, folio_id = Store(None), read_training(folder).record.id
        found = queries.find(store, folio_id)
        model = logged_models.find_ready(store, found.info.run_id)
    metrics = {k: v for k, v in found.data.metrics.items() if k.startswith("evaluate/")}
    linked = logged_models.linked_metrics(model)
    assert linked == metrics | read_training(folder).summary
    return metrics, {k: v for k, v in found.data.tags.items() if k.startswith("evaluat")}


def assert_shows_the_evaluation_in_the_workspace(folder: Path) -> None:
    metrics, tags = shown(folder)
    record = read_evaluation(folder).record
    assert metrics == evaluation_metrics(folder)
    assert tags == {"evaluation": record.id} | record.params


def test_mlflow_shows_the_evaluation_in_the_workspace(make_trained, monkeypatch):
    folder = make_trained()
    assert_shows_the_evaluation_in_the_workspace(folder)
    with inside(folder):
        [tracked] = queries.list_runs(Store(None))
        assert app_models.open_model(tracked.id).name == tracked.name  # not the id
    first = evaluation_metrics(folder)
    set_params(folder, {"evaluate.stride": 1})
    monkeypatch.setattr("stages.evaluate.now_ms", lambda: 5)  # the clock was set back
    run_stages(folder, "evaluate")
    assert evaluation_metrics(folder) != first
    assert_shows_the_evaluation_in_the_workspace(folder)
    succeed(folder, "git", "checkout", "-q", ".")
    succeed(folder, "dvc", "checkout", "--force")
    assert evaluation_metrics(folder) == first
    assert shown(folder)[0] != first
    assert "updated the evaluation metrics of 1x2x16-" in folio(folder, "sync")
    assert_shows_the_evaluation_in_the_workspace(folder)
    assert folio(folder, "sync").strip() == "MLflow has every run"
    # Whatever was logged before, sync corrects it.
    with inside(folder):
        store = Store(None)
        run_id = queries.run_id(store, read_training(folder).record.id)
        store.client.log_metric(run_id, "evaluate/val_loss_sliding", 0.5, 2**52, step=77)
    assert "updated" in folio(folder, "sync")
    assert_shows_the_evaluation_in_the_workspace(folder)


def test_compare_shows_the_params_of_evaluations_that_differ(make_trained, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    folder = make_trained({"train.seed": 5, "evaluate.stride": 1})
    succeed(folder, "dvc", "repro")
    rows = [line for line in folio(folder, "compare").splitlines() if "1x2x16-" in line]
    assert {word for row in rows for word in row.split() if "stride" in word} == {
        "evaluate.stride=1",
        "evaluate.stride=8",
    }
    assert not any("evaluate.top_p" in row for row in rows)


def test_sync_rebuilds_the_same_figures_from_several_evaluations(make_trained):
    """In an empty store, with an evaluation that was committed and a discarded one."""
    folder = make_trained({"evaluate.stride": 1})
    succeed(folder, "dvc", "repro")
    succeed(folder, "git", "checkout", "-q", ".")
    shutil.rmtree(folder / "models")
    remove_store(folder)
    assert sync(folder).count("sent ") == 3
    succeed(folder, "dvc", "checkout")
    [training] = [r for r in content(store(folder)).values() if r.name != "evaluate"]
    points = {key: p for key, p in training.points.items() if key.startswith("evaluate/")}
    assert {key: [value for *_, value in p] for key, p in points.items()} == {
        key: [value] for key, value in evaluation_metrics(folder).items()
    }
    assert sync(folder).strip() == "MLflow has every run"


@pytest.fixture
def copies(make_project, tmp_path) -> tuple[list[Path], Callable[..., subprocess.Popen], str]:
    """Three copies of a half-trained project that differ in runtime.log_interval, a function that
    starts training in one, perhaps to be killed, and the URI of the store that they share."""
    shared = f"sqlite:///{tmp_path / 'shared.db'}"
    first = make_project({"train.steps": 400, "train.eval_interval": 50, "train.patience": None})
    run_stages(first, "prepare")

    def start(folder: Path, killed: bool = False) -> subprocess.Popen:
        variables = (environment if killed else warm_environment)(MLFLOW_TRACKING_URI=shared)
        return subprocess.Popen(["python", "-m", "stages.train"], cwd=folder, env=variables)

    stop_at(60, first, start(first, killed=True))
    folders = [first, tmp_path / "second", tmp_path / "third"]
    for copy, interval in zip(folders[1:], (7, 4), strict=True):
        shutil.copytree(first, copy)
        set_params(copy, {"runtime.log_interval": interval})
    return folders, start, shared


def stop_at(row: int, folder: Path, training: subprocess.Popen) -> None:
    """Kill a training once its history has so many rows."""
    wait_until(lambda: rows(folder) >= row, training)
    training.kill()
    training.wait()


def assert_points_are_those_of_one(folders: list[Path], shared: str) -> None:
    [tracked] = content(shared).values()
    expected = []
    for folder in folders:
        points: dict[str, list[tuple[int, int, float]]] = {}
        for row in read_training(folder).history:
            for key in row.keys() - {"step", "time"}:
                points.setdefault(key, []).append((row["step"], row["time"], row[key]))
        expected.append(points)
    summary = read_training(folders[0]).summary.keys()
    assert {k: p for k, p in tracked.points.items() if k not in summary} in expected
    assert all(len(tracked.points[key]) == 1 for key in summary)
    for folder in folders:
        assert "sent" not in succeed(
            folder, "python", "-m", "folio", "sync", MLFLOW_TRACKING_URI=shared
        )
    assert list(content(shared).values()) == [tracked]


def test_copies_of_a_half_trained_project_leave_the_points_of_one(copies):
    """Two of them train at the same time, and the third one later."""
    folders, start, shared = copies
    running = [start(folder) for folder in folders[:2]]
    assert [training.wait(200) for training in running] == [0, 0]
    assert start(folders[2]).wait(200) == 0
    assert_points_are_those_of_one(folders, shared)


def test_points_of_a_copy_that_never_finished_do_not_remain(copies):
    folders, start, shared = copies
    stop_at(150, folders[0], start(folders[0], killed=True))
    assert start(folders[1]).wait(200) == 0
    assert_points_are_those_of_one(folders[1:2], shared)
