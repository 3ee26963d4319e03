"""MLflow as the stages use it: a real store, a real server, and none at all."""

import contextlib
import dataclasses
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import mlflow
import pytest
from conftest import ROOT, environment, open_store

from folio.run import Record, Run
from folio.tracking import store
from folio.errors import UserError
from folio.tracking.logger import RunLogger
from folio.signals import Stopped

HISTORY = [{"step": n, "time": 1_700_000_000_000 + n, "train_loss": 5.0 - n} for n in (1, 2, 3)]
ONCE = [(1, 4.0), (2, 3.0), (3, 2.0)]
RECORD = Record(
    id="a" * 32, name="tiny", started=1_700_000_000_000, params={"train.seed": "1"}, tags={}
)


@pytest.fixture
def bare(tmp_path, monkeypatch) -> Path:
    """The root of a project with no store yet."""
    monkeypatch.setenv("DVC_ROOT", str(tmp_path))
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    return tmp_path


@pytest.fixture
def project(bare, empty_store) -> Path:
    """The root of a project whose store has no runs."""
    shutil.copy(empty_store, bare)
    open_store(bare)
    return bare


def runs(address: str) -> list[mlflow.entities.Run]:
    client = mlflow.MlflowClient(address)
    experiment = client.get_experiment_by_name("folio")
    return client.search_runs([experiment.experiment_id])


def points(address: str, key: str = "train_loss") -> list[tuple[int, float]]:
    """All points of the only run there is."""
    [run] = runs(address)
    found = mlflow.MlflowClient(address).get_metric_history(run.info.run_id, key)
    return sorted((point.step, point.value) for point in found)


def local(project: Path) -> str:
    return f"sqlite:///{project / 'mlflow.db'}"


def whole(folder: Path) -> Run:
    """A run that is over, with all that a run can have."""
    (folder / "kept").mkdir(exist_ok=True)
    (folder / "kept/a.txt").write_text("a")
    (folder / "kept/record.json").write_text("{}")  # the run itself: it is not sent
    (folder / "b.txt").write_text("b")
    return Run(
        record=dataclasses.replace(RECORD, ended=1_700_000_000_009),
        history=HISTORY,
        figures={"steps": 3, "best": 2.0},
        files=[(folder / "kept", "folder"), (folder / "b.txt", "folder/file")],
    )


def artifacts(address: str) -> list[str]:
    client, [run] = mlflow.MlflowClient(address), runs(address)
    found, folders = [], [None]
    while folders:
        for item in client.list_artifacts(run.info.run_id, folders.pop()):
            (folders if item.is_dir else found).append(item.path)
    return sorted(found)


def test_a_follower_sends_a_training_and_marks_it_finished(project):
    with RunLogger(None, RECORD) as follower:
        follower.follow(HISTORY[:2])
        follower.finish(whole(project))
    [run] = runs(local(project))
    assert (run.info.status, run.info.run_name) == ("FINISHED", "tiny")
    assert run.info.end_time - run.info.start_time == 9
    assert run.data.params == {"train.seed": "1"} and run.data.tags["folio_id"] == RECORD.id
    assert run.data.metrics == {"train_loss": 2.0, "steps": 3.0, "best": 2.0}
    assert points(local(project)) == ONCE and points(local(project), "best") == [(3, 2.0)]
    assert artifacts(local(project)) == ["folder/a.txt", "folder/file/b.txt"]


def test_what_is_sent_twice_is_there_once(project):
    for _ in range(2):
        store = store.Store(None)
        for _ in range(2):
            store.send(whole(project), "FINISHED")
        store.complete(whole(project))
    assert points(local(project)) == ONCE and points(local(project), "best") == [(3, 2.0)]
    assert artifacts(local(project)) == ["folder/a.txt", "folder/file/b.txt"]


def test_half_an_artifact_is_sent_again(project):
    store = store.Store(None)
    store.send(whole(project), "RUNNING")
    [half] = (project / "mlruns").rglob("a.txt")
    half.write_text("")
    store.send(whole(project), "FINISHED")
    assert half.read_text() == "a"


@pytest.mark.parametrize(
    ("problem", "status"), [(Stopped("step 2 is saved"), "KILLED"), (ValueError("bad"), "FAILED")]
)
def test_a_restart_goes_on_with_the_same_run(project, problem, status):
    with pytest.raises(type(problem)), RunLogger(None, RECORD) as follower:
        follower.follow(HISTORY[:2])
        raise problem
    [run] = runs(local(project))
    assert run.info.status == status and run.data.tags["stopped"] == str(problem)
    again = dataclasses.replace(RECORD, name="again", params=RECORD.params | {"data.tokens": "9"})
    with RunLogger(None, again) as follower:
        follower.follow(HISTORY)
        follower.finish(Run(record=again, history=HISTORY))
    [run] = runs(local(project))
    assert (run.info.status, run.info.run_name) == ("FINISHED", "again")
    assert "stopped" not in run.data.tags and run.data.params["data.tokens"] == "9"
    assert points(local(project)) == ONCE


def test_a_param_that_has_changed_meanwhile_does_not_stop_the_rest(project):
    store = store.Store(None)
    store.send(Run(record=RECORD, history=HISTORY[:1]), "RUNNING")
    changed = dataclasses.replace(RECORD, params={"train.seed": "2"})
    store.Store(None).send(Run(record=changed, history=HISTORY), "FINISHED")
    assert points(local(project)) == ONCE


def test_four_processes_that_make_the_store_at_once_all_get_their_run(bare):
    code = """
import sys
from folio.run import Record, Run
from folio.tracking.logger import RunLogger
name = sys.argv[1]
record = Record(id=name * 32, name=name, started=1, params={}, tags={})
run = Run(record=record, figures={"a": 1.0})
with RunLogger(None, record) as follower:
    follower.finish(run)
"""
    ours = environment(ROOT, DVC_ROOT=str(bare))
    four = [subprocess.Popen([sys.executable, "-c", code, name], env=ours) for name in "abcd"]
    assert [process.wait(120) for process in four] == [0] * 4
    found = runs(local(bare))
    assert sorted((r.info.run_name, r.info.status) for r in found) == [
        (name, "FINISHED") for name in "abcd"
    ]
    assert [r.data.metrics for r in found] == [{"a": 1.0}] * 4


def test_a_server_that_is_away_is_said_once_and_how_to_send_the_rest(bare, capsys):
    with RunLogger("http://127.0.0.1:9", RECORD) as follower:
        follower.follow(HISTORY[:1])
        time.sleep(0.5)
        follower.follow(HISTORY)
        follower.finish(whole(bare))
    told = capsys.readouterr().err
    assert told.count("going on without it") == 1
    assert told.strip().splitlines()[-1] == (
        "MLflow lacks a part of this run: `python -m folio sync` sends it"
    )


def test_a_server_that_never_answers_does_not_hold_a_notice_to_stop_up(bare):
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        address = f"http://127.0.0.1:{silent.getsockname()[1]}"
        code = f"""
import os, signal, time
from folio.run import Record, Run
from folio.errors import one_line_errors
from folio.tracking.logger import RunLogger
record = Record(id="a" * 32, name="tiny", started=1, params={{}}, tags={{}})
with one_line_errors(), RunLogger({address!r}, record) as follower:
    started = time.monotonic()
    follower.follow([])
    assert time.monotonic() - started < 1  # nor a training
    print(time.time(), flush=True)
    os.kill(os.getpid(), signal.SIGTERM)
"""
        training = subprocess.run(
            [sys.executable, "-c", code],
            env=environment(ROOT, DVC_ROOT=str(bare)),
            capture_output=True,
            text=True,
        )
        ended = time.time()
    assert training.returncode == 143 and store.LACKING in training.stderr
    assert ended - float(training.stdout) < 10


def test_points_that_a_store_missed_go_with_the_next_call(project, monkeypatch):
    sound, away = store.Store.__init__, threading.Event()

    def opened_later(self, *arguments):
        if not away.is_set():
            away.set()
            raise OSError("away")
        sound(self, *arguments)

    monkeypatch.setattr(store.Store, "__init__", opened_later)
    with RunLogger(None, RECORD) as late:
        assert away.wait(5)
        late.follow(HISTORY)
    assert points(local(project)) == ONCE


def test_a_full_disk_in_the_store_harms_nothing_and_is_made_up_for(
    project, monkeypatch, capsys, small_disk
):
    monkeypatch.setenv("DVC_ROOT", str(small_disk.folder))
    store.Store(None)
    small_disk.fill()
    with RunLogger(None, RECORD) as follower:
        follower.finish(whole(project))
    assert "python -m folio sync" in capsys.readouterr().err
    small_disk.clear()
    store.Store(None).complete(whole(project))
    assert points(local(small_disk.folder)) == ONCE
    assert artifacts(local(small_disk.folder)) == ["folder/a.txt", "folder/file/b.txt"]


def test_a_store_whose_making_was_killed_is_made_anew(bare):
    code = """
import os, signal
from folio.tracking import store
store.mlflow.MlflowClient.create_experiment = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
store.Store(None)
"""
    ours = environment(ROOT, DVC_ROOT=str(bare))
    assert subprocess.run([sys.executable, "-c", code], env=ours).returncode < 0
    assert not (bare / "mlflow.db").exists() and list(bare.glob("mlflow.db.new*"))
    store.Store(None).send(whole(bare), "FINISHED")
    assert points(local(bare)) == ONCE and not list(bare.glob("mlflow.db.new*"))


def test_a_project_that_was_moved_is_told_how_to_mend_its_store(project, monkeypatch):
    store.Store(None).send(whole(project), "FINISHED")
    moved = project / "elsewhere & more"
    moved.mkdir()
    for name in ("mlflow.db", "mlruns"):
        (project / name).rename(moved / name)
    monkeypatch.setenv("DVC_ROOT", str(moved))
    with pytest.raises(UserError, match=r"has been moved since: `python -m folio sync` mends"):
        store.Store(None)
    store.Store(None, mend=True)
    client, [run] = mlflow.MlflowClient(local(moved)), runs(local(moved))
    assert Path(client.download_artifacts(run.info.run_id, "folder/a.txt")).read_text() == "a"
    store.Store(None).send(
        dataclasses.replace(whole(moved), record=dataclasses.replace(RECORD, id="b")), "FINISHED"
    )
    assert not (project / "mlruns").exists()


def test_a_relative_store_lies_in_the_project_wherever_the_stage_runs(bare, monkeypatch):
    monkeypatch.chdir(bare.parent)
    store = store.Store("sqlite:///other.db")
    assert store.address == f"sqlite:///{bare / 'other.db'}"
    store.send(whole(bare), "FINISHED")
    assert artifacts(store.address) == ["folder/a.txt", "folder/file/b.txt"]
    assert (bare / "mlruns").exists() and not (bare.parent / "mlruns").exists()


def test_an_evaluation_is_nested_and_its_figures_are_on_the_training_too(project):
    store = store.Store(None)
    for seed in (1, 2, 1):  # the third finds what the first has found
        store.complete(whole(project))
        store.complete(
            Run(
                record=dataclasses.replace(
                    RECORD, id=f"{seed}" * 32, parent=RECORD.id, name="evaluate", ended=seed + 10
                ),
                figures={"evaluate/val_loss": float(seed)},
            )
        )
    parents = [r for r in runs(local(project)) if r.info.run_name == "tiny"]
    children = [r for r in runs(local(project)) if r.info.run_name == "evaluate"]
    assert [len(parents), len(children)] == [1, 2]
    parent = parents[0].info.run_id
    assert all(child.data.tags["mlflow.parentRunId"] == parent for child in children)
    assert parents[0].data.metrics["evaluate/val_loss"] == 2.0


def test_what_the_user_has_deleted_stays_so_until_its_training_goes_on(project):
    store = store.Store(None)
    store.send(whole(project), "KILLED")
    client, [run] = mlflow.MlflowClient(local(project)), runs(local(project))
    client.delete_run(run.info.run_id)
    store = store.Store(None)
    store.complete(whole(project))
    child = dataclasses.replace(RECORD, id="c" * 32, parent=RECORD.id)
    store.complete(Run(record=child))
    assert runs(local(project)) == [] and store.statuses() == {RECORD.id: "DELETED"}
    with RunLogger(None, RECORD) as follower:
        follower.finish(whole(project))
    assert [r.info.status for r in runs(local(project))] == ["FINISHED"]


def test_a_training_that_was_cut_short_is_lacking_as_long_as_its_last_point(project):
    store = store.Store(None)
    assert store.lacks(RECORD, HISTORY)
    store.send(Run(record=RECORD, history=HISTORY[:2]), "KILLED")
    assert store.lacks(RECORD, HISTORY)
    store.send(Run(record=RECORD, history=HISTORY), "KILLED")
    assert not store.lacks(RECORD, HISTORY)


def test_an_evaluation_without_its_training_is_one_line(project):
    orphan = dataclasses.replace(RECORD, parent="b" * 32)
    with pytest.raises(UserError, match=r"is not there: `python -m folio sync` sends it"):
        store.Store(None).complete(Run(record=orphan))


def test_the_machines_load_is_read_by_the_names_that_mlflow_shows(monkeypatch):
    monkeypatch.setattr(store.Load, "SECONDS", 0.2)
    load = store.Load()
    assert load.read() == {}  # too early
    time.sleep(0.2)
    read = load.read()
    assert 0 <= read["system/cpu_utilization_percentage"] <= 100
    assert read["system/system_memory_usage_megabytes"] > 100


@contextlib.contextmanager
def serving(project: Path, *command: str) -> Iterator[str]:
    """Run an MLflow command that serves, in a project's folder; yields its address."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with (project / "server.log").open("w") as log:
        server = subprocess.Popen(
            [*command, "--port", str(port), "--workers", "1"],
            cwd=project,
            env=environment(),
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


def test_a_server_keeps_the_runs_and_the_artifacts(bare, monkeypatch):
    store, kept = f"sqlite:///{bare / 'server.db'}", str(bare / "server")
    options = ["--backend-store-uri", store, "--artifacts-destination", kept]
    with serving(bare, "mlflow", "server", *options) as address:
        monkeypatch.setenv("MLFLOW_TRACKING_URI", address)
        for _ in range(2):
            with RunLogger(None, RECORD) as follower:
                follower.finish(whole(bare))
        assert points(address) == ONCE
        assert artifacts(address) == ["folder/a.txt", "folder/file/b.txt"]
    assert len(list((bare / "server").rglob("*.txt"))) == 2
    assert not (bare / "mlflow.db").exists()


def test_mlflow_ui_without_arguments_shows_the_runs_and_their_artifacts(project):
    store.Store(None).send(whole(project), "FINISHED")
    with serving(project, "mlflow", "ui") as address:
        [shown] = runs(address)
        assert shown.data.metrics["train_loss"] == 2.0
        page = f"{address}/get-artifact?path=folder/a.txt&run_uuid={shown.info.run_id}"
        with urllib.request.urlopen(page) as answer:
            assert answer.read() == b"a"
