"""Tracking with a local MLflow store, with a server, and while a server is down."""

import contextlib
import dataclasses
import importlib.metadata
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
from urllib.parse import urlsplit
from urllib.request import url2pathname

import mlflow
import pytest
from conftest import ROOT, environment, open_store
from mlflow.entities import LoggedModel

from folio import files, signals
from folio.errors import UserError
from folio.gpt import huggingface
from folio.run import Record, Run, read_evaluation, write_record
from folio.signals import Stopped
from folio.tracking import logged_models, queries
from folio.tracking.logger import INCOMPLETE, RunLogger
from folio.tracking.store import Store
from folio.tracking.system_metrics import SystemMetrics
from folio.tracking.writer import RunWriter

HISTORY = [{"step": n, "time": 1_700_000_000_000 + n, "train_loss": 5.0 - n} for n in (1, 2, 3)]
POINTS = [(1, 4.0), (2, 3.0), (3, 2.0)]  # of HISTORY
RECORD = Record(
    id="a" * 32, name="tiny", started=1_700_000_000_000, params={"train.seed": "1"}, tags={}
)


@pytest.fixture
def bare(tmp_path, monkeypatch) -> Path:
    """The root of a project without a store."""
    monkeypatch.setenv("DVC_ROOT", str(tmp_path))
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    return tmp_path


@pytest.fixture
def project(bare, empty_store) -> Path:
    """The root of a project with an empty store."""
    shutil.copy(empty_store, bare)
    open_store(bare)
    return bare


def runs(uri: str) -> list[mlflow.entities.Run]:
    client = mlflow.MlflowClient(uri)
    experiment = client.get_experiment_by_name("folio")
    return client.search_runs([experiment.experiment_id])


def points(uri: str, key: str = "train_loss") -> list[tuple[int, float]]:
    """The points of a metric of the only run in the store."""
    [run] = runs(uri)
    found = mlflow.MlflowClient(uri).get_metric_history(run.info.run_id, key)
    return sorted((point.step, point.value) for point in found)


def local(project: Path) -> str:
    return f"sqlite:///{project / 'mlflow.db'}"


def finished_run(folder: Path) -> Run:
    """A finished run with a history, a summary and files, which are created in `folder`."""
    (folder / "files").mkdir(exist_ok=True)
    (folder / "files/a.txt").write_text("a")
    (folder / "files/record.json").write_text("{}")  # is not uploaded
    (folder / "b.txt").write_text("b")
    return Run(
        record=dataclasses.replace(RECORD, ended=1_700_000_000_009),
        history=HISTORY,
        summary={"steps": 3, "best": 2.0},
        files=[(folder / "files", "folder"), (folder / "b.txt", "folder/file")],
    )


def artifacts(uri: str, name: str = "tiny") -> list[str]:
    """The paths of all artifacts of the run with that name."""
    client, [run] = mlflow.MlflowClient(uri), [r for r in runs(uri) if r.info.run_name == name]
    found, folders = [], [None]
    while folders:
        for item in client.list_artifacts(run.info.run_id, folders.pop()):
            (folders if item.is_dir else found).append(item.path)
    return sorted(found)


def test_logger_sends_a_training_and_marks_it_as_finished(project):
    with RunLogger(None, RECORD) as logger:
        logger.send(HISTORY[:2])
        logger.finish(finished_run(project))
    [run] = runs(local(project))
    assert (run.info.status, run.info.run_name) == ("FINISHED", "tiny")
    assert run.info.end_time - run.info.start_time == 9
    assert run.data.params == {"train.seed": "1"} and run.data.tags["folio_id"] == RECORD.id
    assert run.data.metrics == {"train_loss": 2.0, "steps": 3.0, "best": 2.0}
    assert points(local(project)) == POINTS and points(local(project), "best") == [(3, 2.0)]
    assert artifacts(local(project)) == ["folder/a.txt", "folder/file/b.txt"]


def test_logger_creates_the_run_of_a_training_that_fails_before_its_first_step(project):
    with pytest.raises(ValueError, match="bad"), RunLogger(None, RECORD):
        raise ValueError("bad")
    [run] = runs(local(project))
    assert (run.info.status, run.data.tags["stopped"]) == ("FAILED", "bad")


def test_logger_creates_the_run_at_its_start(project):
    with RunLogger(None, RECORD) as logger:
        logger.start()
        logger.start()
    [run] = runs(local(project))
    assert run.info.status == "RUNNING"


def test_writer_send_is_idempotent(project):
    for _ in range(2):
        writer = RunWriter(Store(None))
        for _ in range(2):
            writer.send(finished_run(project), "FINISHED")
        writer.complete(finished_run(project))
    assert points(local(project)) == POINTS and points(local(project), "best") == [(3, 2.0)]
    assert artifacts(local(project)) == ["folder/a.txt", "folder/file/b.txt"]


def test_writer_uploads_an_incomplete_artifact_again(project):
    writer = RunWriter(Store(None))
    writer.send(finished_run(project), "RUNNING")
    [incomplete] = (project / "mlruns").rglob("a.txt")
    incomplete.write_text("")
    writer.send(finished_run(project), "FINISHED")
    assert incomplete.read_text() == "a"


@pytest.mark.parametrize(
    ("problem", "status"), [(Stopped("step 2 is saved"), "KILLED"), (ValueError("bad"), "FAILED")]
)
def test_logger_resumes_the_run_of_an_interrupted_training(project, problem, status):
    with pytest.raises(type(problem)), RunLogger(None, RECORD) as logger:
        logger.send(HISTORY[:2])
        raise problem
    [run] = runs(local(project))
    assert run.info.status == status and run.data.tags["stopped"] == str(problem)
    params = RECORD.params | {"data.tokens": "9"}
    resumed = dataclasses.replace(RECORD, name="resumed", params=params)
    with RunLogger(None, resumed) as logger:
        logger.send(HISTORY)
        logger.finish(Run(record=resumed, history=HISTORY))
    [run] = runs(local(project))
    assert (run.info.status, run.info.run_name) == ("FINISHED", "resumed")
    assert "stopped" not in run.data.tags and run.data.params["data.tokens"] == "9"
    assert points(local(project)) == POINTS


def test_writer_sends_the_points_of_a_run_whose_param_has_changed(project):
    RunWriter(Store(None)).send(Run(record=RECORD, history=HISTORY[:1]), "RUNNING")
    changed = dataclasses.replace(RECORD, params={"train.seed": "2"})
    RunWriter(Store(None)).send(Run(record=changed, history=HISTORY), "FINISHED")
    assert points(local(project)) == POINTS


def test_store_can_be_created_by_four_processes_at_once(bare):
    code = """
import sys
from folio.run import Record, Run
from folio.tracking.logger import RunLogger
name = sys.argv[1]
record = Record(id=name * 32, name=name, started=1, params={}, tags={})
run = Run(record=record, summary={"a": 1.0})
with RunLogger(None, record) as logger:
    logger.finish(run)
"""
    env = environment(ROOT, DVC_ROOT=str(bare))
    processes = [subprocess.Popen([sys.executable, "-c", code, n], env=env) for n in "abcd"]
    assert [process.wait(120) for process in processes] == [0] * 4
    found = runs(local(bare))
    assert sorted((r.info.run_name, r.info.status) for r in found) == [
        (name, "FINISHED") for name in "abcd"
    ]
    assert [r.data.metrics for r in found] == [{"a": 1.0}] * 4


def test_logger_warns_once_if_the_server_is_down(bare, capsys):
    with RunLogger("http://127.0.0.1:9", RECORD) as logger:
        logger.send(HISTORY[:1])
        time.sleep(0.5)
        logger.send(HISTORY)
        logger.finish(finished_run(bare))
    stderr = capsys.readouterr().err
    assert stderr.count("MLflow failed, continuing without it: ") == 1
    assert stderr.strip().splitlines()[-1] == (
        "MLflow does not have all of this run yet: `python -m folio sync` sends the rest"
    )


SLOW_IMPORT = """
import sys, time
class Finder:
    def find_spec(name, *_):
        if name == "folio.tracking.store":
            time.sleep(60)
sys.meta_path.insert(0, Finder)
"""


@pytest.mark.parametrize("before", ["", SLOW_IMPORT], ids=["silent", "slow import"])
def test_logger_does_not_delay_sigterm_if_the_server_never_responds(bare, before):
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        uri = f"http://127.0.0.1:{silent.getsockname()[1]}"
        code = f"""{before}
import os, signal, time
from folio.run import Record, Run
from folio.errors import one_line_errors
from folio.tracking.logger import RunLogger
record = Record(id="a" * 32, name="tiny", started=1, params={{}}, tags={{}})
with one_line_errors(), RunLogger({uri!r}, record) as logger:
    started = time.monotonic()
    logger.send([])
    assert time.monotonic() - started < 1
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
    assert training.returncode == 143 and INCOMPLETE in training.stderr
    assert ended - float(training.stdout) < 10


@pytest.mark.parametrize("sent", ["a training", "an evaluation"])
def test_stop_request_while_the_end_is_sent_leaves_a_finished_run(project, monkeypatch, sent):
    monkeypatch.setattr(signals, "GRACE_PERIOD", 24 * 3600.0)
    monkeypatch.setattr(signals, "_cause", None)
    terminate = mlflow.MlflowClient.set_terminated

    def stop_before(*arguments, **options):
        os.kill(os.getpid(), signal.SIGHUP)
        time.sleep(0.3)
        terminate(*arguments, **options)

    monkeypatch.setattr(mlflow.MlflowClient, "set_terminated", stop_before)
    with pytest.raises(Stopped, match="stopped by SIGHUP"), signals.handled(print):
        if sent == "an evaluation":
            RunWriter(Store(None)).complete(finished_run(project))
        else:
            with RunLogger(None, RECORD) as logger:
                logger.finish(finished_run(project))
    [run] = runs(local(project))
    assert run.info.status == "FINISHED" and run.data.metrics["best"] == 2.0


def test_logger_sends_missed_points_with_the_next_call(project, monkeypatch):
    connect, failed = Store.__init__, threading.Event()

    def fail_once(self, *arguments):
        if not failed.is_set():
            failed.set()
            raise OSError("the store is down")
        connect(self, *arguments)

    monkeypatch.setattr(Store, "__init__", fail_once)
    with RunLogger(None, RECORD) as logger:
        logger.start()
        assert failed.wait(5)
        logger.send(HISTORY)
    assert points(local(project)) == POINTS


def test_logger_survives_a_full_disk_and_the_run_can_be_completed_later(
    project, monkeypatch, capsys, small_disk
):
    monkeypatch.setenv("DVC_ROOT", str(small_disk.folder))
    Store(None)
    small_disk.fill()
    with RunLogger(None, RECORD) as logger:
        logger.finish(finished_run(project))
    assert "python -m folio sync" in capsys.readouterr().err
    small_disk.clear()
    RunWriter(Store(None)).complete(finished_run(project))
    assert points(local(small_disk.folder)) == POINTS
    assert artifacts(local(small_disk.folder)) == ["folder/a.txt", "folder/file/b.txt"]


def test_store_is_created_again_if_its_creation_was_killed(bare):
    code = """
import os, signal
from mlflow import MlflowClient
from folio.tracking.store import Store
MlflowClient.create_experiment = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
Store(None)
"""
    env = environment(ROOT, DVC_ROOT=str(bare))
    assert subprocess.run([sys.executable, "-c", code], env=env).returncode == -signal.SIGKILL
    assert not (bare / "mlflow.db").exists() and list(bare.glob("mlflow.db.new*"))
    RunWriter(Store(None)).send(finished_run(bare), "FINISHED")
    assert points(local(bare)) == POINTS and not list(bare.glob("mlflow.db.new*"))


def test_store_of_a_moved_project_can_be_repaired(project, monkeypatch):
    RunWriter(Store(None)).send(finished_run(project), "FINISHED")
    moved = project / "elsewhere & more"
    moved.mkdir()
    for name in ("mlflow.db", "mlruns"):
        (project / name).rename(moved / name)
    monkeypatch.setenv("DVC_ROOT", str(moved))
    with pytest.raises(UserError, match=r"has been moved since: `python -m folio sync` updates"):
        Store(None)
    Store(None, repair=True)
    client, [run] = mlflow.MlflowClient(local(moved)), runs(local(moved))
    assert Path(client.download_artifacts(run.info.run_id, "folder/a.txt")).read_text() == "a"
    RunWriter(Store(None)).send(
        dataclasses.replace(finished_run(moved), record=dataclasses.replace(RECORD, id="b")),
        "FINISHED",
    )
    assert not (project / "mlruns").exists()


def test_store_resolves_a_relative_uri_from_the_project_root(bare, monkeypatch):
    monkeypatch.chdir(bare.parent)
    store = Store("sqlite:///other.db")
    assert store.uri == f"sqlite:///{bare / 'other.db'}"
    RunWriter(store).send(finished_run(bare), "FINISHED")
    assert artifacts(store.uri) == ["folder/a.txt", "folder/file/b.txt"]
    assert (bare / "mlruns").exists() and not (bare.parent / "mlruns").exists()


def test_evaluation_is_nested_and_the_training_gets_its_summary(project):
    writer = RunWriter(Store(None))
    for seed in (1, 2, 1):  # the third evaluation equals the first
        writer.complete(finished_run(project))
        writer.complete(
            Run(
                record=dataclasses.replace(
                    RECORD, id=f"{seed}" * 32, parent=RECORD.id, name="evaluate", ended=seed + 10
                ),
                summary={"evaluate/val_loss": float(seed)},
            )
        )
    parents = [r for r in runs(local(project)) if r.info.run_name == "tiny"]
    children = [r for r in runs(local(project)) if r.info.run_name == "evaluate"]
    assert [len(parents), len(children)] == [1, 2]
    parent = parents[0].info.run_id
    assert all(child.data.tags["mlflow.parentRunId"] == parent for child in children)
    assert parents[0].data.metrics["evaluate/val_loss"] == 1.0  # of the last one
    assert parents[0].data.tags["evaluation"] == "1" * 32


def evaluation(folder: Path, names: tuple[str, ...] = ("loss.png", "samples.md")) -> Run:
    """An evaluation of RECORD's training, with files of those names, under `folder`."""
    out = folder / "models/evaluation"
    out.mkdir(parents=True)
    for name in names:
        (out / name).write_text(name)
    (out / "metrics.json").write_text('{"val_loss": 2.5}')
    write_record(
        dataclasses.replace(RECORD, id="e" * 32, parent=RECORD.id, name="evaluate", ended=9),
        out / "record.json",
    )
    return read_evaluation(folder)


def test_evaluation_uploads_the_loss_plot_to_its_training(project):
    writer, run = RunWriter(Store(None)), evaluation(project)
    for _ in range(2):
        writer.complete(finished_run(project))
        writer.complete(run)
        assert artifacts(local(project)) == [
            "folder/a.txt",
            "folder/file/b.txt",
            "training/loss.png",
        ]
    [plot] = (project / "mlruns").rglob("training/loss.png")
    assert plot.read_text() == "loss.png"
    plot.unlink()
    writer.complete(run)  # the evaluation itself is finished already
    assert plot.read_text() == "loss.png"


def test_evaluation_of_an_earlier_folio_without_a_loss_plot_is_sent(project):
    writer = RunWriter(Store(None))
    writer.complete(finished_run(project))
    writer.complete(evaluation(project, ("samples.md",)))
    assert artifacts(local(project)) == ["folder/a.txt", "folder/file/b.txt"]
    expected = ["evaluation/metrics.json", "evaluation/samples.md"]
    assert artifacts(local(project), "evaluate") == expected


def test_deleted_run_stays_deleted_until_its_training_resumes(project):
    RunWriter(Store(None)).send(finished_run(project), "KILLED")
    client, [run] = mlflow.MlflowClient(local(project)), runs(local(project))
    client.delete_run(run.info.run_id)
    store = Store(None)
    writer = RunWriter(store)
    writer.complete(finished_run(project))
    child = dataclasses.replace(RECORD, id="c" * 32, parent=RECORD.id)
    writer.complete(Run(record=child))
    assert runs(local(project)) == [] and queries.statuses(store) == {RECORD.id: "DELETED"}
    with RunLogger(None, RECORD) as logger:
        logger.finish(finished_run(project))
    assert [r.info.status for r in runs(local(project))] == ["FINISHED"]


def test_interrupted_run_is_outdated_until_its_last_point_is_sent(project):
    store = Store(None)
    writer = RunWriter(store)
    assert queries.is_outdated(store, RECORD, HISTORY)
    writer.send(Run(record=RECORD, history=HISTORY[:2]), "KILLED")
    assert queries.is_outdated(store, RECORD, HISTORY)
    writer.send(Run(record=RECORD, history=HISTORY), "KILLED")
    assert not queries.is_outdated(store, RECORD, HISTORY)


def test_evaluation_without_its_training_raises_user_error(project):
    orphan = dataclasses.replace(RECORD, parent="b" * 32)
    with pytest.raises(UserError, match=r"is not in MLflow: `python -m folio sync` sends it"):
        RunWriter(Store(None)).complete(Run(record=orphan))


def files_of(model: LoggedModel) -> dict[str, Path]:
    """The files of a model in a local store, by name."""
    folder = Path(url2pathname(urlsplit(model.artifact_location).path))
    return {path.name: path for path in folder.iterdir()}


def test_logged_model_requires_the_versions_that_an_index_serves(monkeypatch):
    monkeypatch.setattr(importlib.metadata, "version", lambda _: "2.11.0+cu128")
    assert logged_models._installed_version("torch") == "2.11.0"


def test_logged_model_generates_text_with_its_own_copy_of_folio(project, model, tmp_path):
    folder = tmp_path / "gpt2"
    huggingface.save(model, folder)  # its 40 tokens are the first of GPT-2's: "A" is one
    store = Store(None)
    RunWriter(store).send(Run(record=RECORD), "FINISHED")
    run = queries.find_run(store, RECORD.id)
    tags = RECORD.tags | {"weights_sha256": files.sha256(folder / "model.safetensors")}
    record = dataclasses.replace(RECORD, name="an.odd/name: 1x2", tags=tags)
    model = logged_models.log(store, run.id, folder, record)
    assert (model.name, model.params) == ("an-odd-name- 1x2", RECORD.params)
    model_id = logged_models.logged_model_id(store, run)
    requirements = files_of(model)["requirements.txt"].read_text().splitlines()
    assert {line.partition("==")[0] for line in requirements} >= {"mlflow", "torch", "tiktoken"}
    for name, version in (line.split("==") for line in requirements):
        assert version == importlib.metadata.version(name).partition("+")[0]
    assert "python: 3." in files_of(model)["python_env.yaml"].read_text()
    code = f"""
import sys
import mlflow
loaded = mlflow.pyfunc.load_model("models:/{model_id}")
params = {{"tokens": 9, "seed": 1}}
first, second = loaded.predict(["A", "!"], params=params)
assert [first, second] == loaded.predict(["A", "!"], params=params)
assert len(first) == len(second) == 9, (first, second)
try:
    loaded.predict(["A"], params={{"tokens": 1001}})
except mlflow.MlflowException as problem:
    assert "tokens is 1001; it must be a whole number between 1 and 1000" in str(problem)
    assert problem.get_http_status_code() == 400
else:
    raise AssertionError
assert "folio.tracking" not in sys.modules
print(sys.modules["folio"].__file__)
"""
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    env = environment(MLFLOW_TRACKING_URI=store.uri, PYTHONPATH="")
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, env=env, cwd=elsewhere, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert Path(done.stdout.strip()).is_relative_to(project / "mlruns")


def test_system_metrics_have_the_names_that_mlflow_expects(monkeypatch):
    monkeypatch.setattr(SystemMetrics, "INTERVAL", 0.2)
    system_metrics = SystemMetrics()
    assert system_metrics.read() == {}  # the interval is not over
    time.sleep(0.2)
    metrics = system_metrics.read()
    assert 0 <= metrics["system/cpu_utilization_percentage"] <= 100
    assert metrics["system/system_memory_usage_megabytes"] > 100


@contextlib.contextmanager
def serving(project: Path, *command: str, **env: str) -> Iterator[str]:
    """Run an MLflow server with that command in a project's folder. Yields its URI.

    env: environment variables, in which PORT stands for the server's port.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    env = {name: value.replace("PORT", str(port)) for name, value in env.items()}
    with (project / "server.log").open("w") as log:
        server = subprocess.Popen(
            [*command, "--port", str(port), "--workers", "1"],
            cwd=project,
            env=environment(
                **{key: value.replace("PORT", str(port)) for key, value in env.items()}
            ),
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
    try:
        end = time.monotonic() + 90
        while not is_open(port):
            assert server.poll() is None and time.monotonic() < end, "the server did not start"
            time.sleep(0.2)
        yield f"http://127.0.0.1:{port}"
    finally:
        os.killpg(server.pid, signal.SIGKILL)
        server.wait()


def is_open(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def test_server_stores_the_runs_and_their_artifacts(bare, server_store, monkeypatch):
    options = ["--backend-store-uri", f"sqlite:///{shutil.copy(server_store, bare / 'server.db')}"]
    options += ["--artifacts-destination", str(bare / "server")]
    with serving(bare, "mlflow", "server", *options) as uri:
        monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
        for _ in range(2):
            with RunLogger(None, RECORD) as logger:
                logger.finish(finished_run(bare))
        assert points(uri) == POINTS
        assert artifacts(uri) == ["folder/a.txt", "folder/file/b.txt"]
    assert len(list((bare / "server").rglob("*.txt"))) == 2
    assert not (bare / "mlflow.db").exists()


def test_mlflow_ui_shows_the_runs_and_their_artifacts(project):
    RunWriter(Store(None)).send(finished_run(project), "FINISHED")
    with serving(project, "mlflow", "ui") as uri:
        [shown] = runs(uri)
        assert shown.data.metrics["train_loss"] == 2.0
        artifact = f"{uri}/get-artifact?path=folder/a.txt&run_uuid={shown.info.run_id}"
        with urllib.request.urlopen(artifact) as response:
            assert response.read() == b"a"
