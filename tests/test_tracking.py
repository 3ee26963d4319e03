"""MLflow as the stages use it: a real store, a real server, and none at all."""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import mlflow
import pytest
from conftest import ROOT

from folio import tracking

HISTORY = [{"step": n, "time": 1_700_000_000_000 + n, "train_loss": 5.0 - n} for n in (1, 2, 3)]


@pytest.fixture
def project(tmp_path, monkeypatch) -> Path:
    """The root of a project with no store yet."""
    monkeypatch.setenv("DVC_ROOT", str(tmp_path))
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    yield tmp_path
    while mlflow.active_run():
        mlflow.end_run()


def points(run_id: str, key: str = "train_loss") -> list[tuple[int, float]]:
    found = mlflow.MlflowClient().get_metric_history(run_id, key)
    return sorted((point.step, point.value) for point in found)


def test_rows_sent_twice_are_kept_once(project):
    with tracking.Run(None) as first:
        first.ship(HISTORY)
        first._shipped = 0
        first.ship(HISTORY)
    assert points(first.id) == [(1, 4.0), (2, 3.0), (3, 2.0)]


def test_a_restart_goes_on_with_the_same_run(project):
    memo = project / "run_id"
    with pytest.raises(RuntimeError), tracking.Run(None, memo=memo) as killed:
        killed.ship(HISTORY[:2])
        raise RuntimeError
    assert mlflow.get_run(killed.id).info.status == "FAILED"
    with tracking.Run(None, memo=memo) as resumed:
        resumed.ship(HISTORY)
    assert resumed.id == killed.id
    assert mlflow.get_run(resumed.id).info.status == "FINISHED"
    assert points(resumed.id) == [(1, 4.0), (2, 3.0), (3, 2.0)]


def test_a_remembered_run_that_the_store_lacks_gives_a_new_one(project):
    memo = project / "run_id"
    memo.write_text("0" * 32)
    with tracking.Run(None, memo=memo) as new:
        new.ship(HISTORY)
    assert new.id != "0" * 32 and memo.read_text() == new.id


def test_two_processes_that_make_the_store_at_once_both_get_their_run(project):
    code = "from folio import tracking\nwith tracking.Run(None) as r: r.metrics({'a': 1.0})"
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    both = [subprocess.Popen([sys.executable, "-c", code], env=environment) for _ in range(2)]
    assert [process.wait(120) for process in both] == [0, 0]
    mlflow.set_tracking_uri(f"sqlite:///{project / 'mlflow.db'}")
    found = mlflow.search_runs(experiment_names=["folio"], output_format="list")
    assert [r.info.status for r in found] == ["FINISHED"] * 2
    assert [r.data.metrics for r in found] == [{"a": 1.0}] * 2


def test_a_server_that_is_away_is_said_once_and_harms_nothing(project, monkeypatch, capsys):
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    with tracking.Run("http://127.0.0.1:9") as away:
        away.ship(HISTORY)
        away.metrics({"a": 1.0})
        away.artifacts(Path(__file__))
    assert away.id is None
    assert capsys.readouterr().err.count("going on without it") == 1


def test_points_that_a_store_missed_go_with_the_next_call(project, monkeypatch):
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    with tracking.Run("http://127.0.0.1:9") as late:
        late.ship(HISTORY[:1])
        late._address = None  # the store comes back
        late.ship(HISTORY)
    assert points(late.id) == [(1, 4.0), (2, 3.0), (3, 2.0)]


def test_evaluate_adds_to_a_run_that_is_over_and_says_when_there_is_none(project, capsys):
    with tracking.Run(None) as trained:
        pass
    again = tracking.reopen(None, trained.id)
    again.metrics({"evaluate/val_loss": 4.5})
    assert mlflow.get_run(trained.id).data.metrics == {"evaluate/val_loss": 4.5}
    assert mlflow.get_run(trained.id).info.status == "FINISHED"
    assert tracking.reopen(None, "0" * 32) is None
    assert "0" * 32 in capsys.readouterr().err


@contextlib.contextmanager
def serving(project: Path, *command: str) -> Iterator[str]:
    """Run an MLflow command that serves, in a project's folder; yields its address."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = {k: v for k, v in os.environ.items() if not k.startswith("MLFLOW_")}
    environment["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    with (project / "server.log").open("w") as log:
        server = subprocess.Popen(
            [*command, "--port", str(port), "--workers", "1"],
            cwd=project,
            env=environment,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
    try:
        end = time.monotonic() + 90
        while not answers(port):
            assert server.poll() is None and time.monotonic() < end, "the server did not start"
            time.sleep(0.2)
        yield f"http://127.0.0.1:{port}"
    finally:
        os.killpg(server.pid, signal.SIGKILL)
        server.wait()


def answers(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def test_a_server_given_by_the_environment_gets_points_and_artifacts(project, monkeypatch):
    store, artifacts = f"sqlite:///{project / 'server.db'}", str(project / "kept")
    options = ["--backend-store-uri", store, "--artifacts-destination", artifacts]
    with serving(project, "mlflow", "server", *options) as address:
        monkeypatch.setenv("MLFLOW_TRACKING_URI", address)
        with tracking.Run(None) as tracked:
            tracked.ship(HISTORY)
            tracked.artifacts(Path(__file__), "there")
        assert points(tracked.id) == [(1, 4.0), (2, 3.0), (3, 2.0)]
    kept = [path.name for path in (project / "kept").rglob("*.py")]
    assert kept == [Path(__file__).name]
    assert not (project / "mlflow.db").exists()


def test_mlflow_ui_without_arguments_shows_the_runs_and_their_artifacts(project):
    with tracking.Run(None) as tracked:
        tracked.ship(HISTORY)
        tracked.artifacts(Path(__file__), "there")
    with serving(project, "mlflow", "ui") as address:
        client = mlflow.MlflowClient(address)
        experiment = client.get_experiment_by_name("folio")
        [shown] = client.search_runs([experiment.experiment_id])
        assert shown.info.run_id == tracked.id and shown.data.metrics == {"train_loss": 2.0}
        page = f"{address}/get-artifact?path=there/{Path(__file__).name}&run_uuid={tracked.id}"
        with urllib.request.urlopen(page) as answer:
            assert answer.read() == Path(__file__).read_bytes()
