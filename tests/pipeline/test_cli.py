"""`python -m folio` as a user runs it, and models in MLflow, after a real training."""

import contextlib
import dataclasses
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import mlflow
import pytest
from conftest import environment, folio, run, set_params
from playwright.sync_api import Page, expect, sync_playwright
from typer.testing import CliRunner

from folio.app.models import open_model
from folio.cli.main import app as commands
from folio.cli.promote import promote_run
from folio.errors import UserError
from folio.run import Run, new_id, read_training
from folio.tracking import logged_models, queries, registry, ui
from folio.tracking.queries import TrackedRun, find_run
from folio.tracking.store import Store
from folio.tracking.writer import RunWriter


@pytest.fixture(scope="module")
def project(make_trained) -> Path:
    """A project whose stages have run once."""
    return make_trained()


@pytest.fixture
def store(project, monkeypatch) -> Store:
    monkeypatch.setenv("DVC_ROOT", str(project))
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    return Store(None)


def process(folder: Path, *words: str) -> subprocess.CompletedProcess:
    return run(folder, "python", "-m", "folio", *words)


def tracked(store: Store, project: Path) -> TrackedRun:
    """The project's own training run, as MLflow has it."""
    return find_run(store, read_training(project).record.id)


def send_copy(store: Store, project: Path, loss: float, **tags: str) -> str:
    """Send a copy of the project's training with another validation loss. Returns MLflow's id."""
    trained = read_training(project)
    record = dataclasses.replace(
        trained.record, id=new_id(), name=f"loss {loss}", tags=trained.record.tags | tags
    )
    summary = trained.summary | {"kept_val_loss": loss}
    RunWriter(store).send(dataclasses.replace(trained, record=record, summary=summary), "FINISHED")
    return queries.run_id(store, record.id)


def test_sample_writes_the_same_text_for_the_same_seed(project):
    texts = [process(project, "sample", "The sea", "--tokens", "8", "--seed", "3") for _ in "ab"]
    assert texts[0].stdout == texts[1].stdout != "The sea\n"
    assert texts[0].stdout.startswith("The sea") and "seed 3, " in texts[0].stderr


def test_sample_treats_a_tiny_temperature_as_zero(project):
    texts = [
        folio(project, "sample", "The sea", "--tokens", "8", "--temperature", t)
        for t in ("0", "1e-320")
    ]
    assert texts[0] == texts[1] != ""


def test_sample_replaces_characters_that_the_terminal_cannot_encode(project):
    words = [sys.executable, "-m", "folio", "sample", "“é”", "--tokens", "1"]
    done = run(project, *words, PYTHONIOENCODING="ascii")
    assert done.returncode == 0 and done.stdout.startswith("???")


def test_sample_reads_a_prompt_from_a_pipe(project):
    words = [sys.executable, "-m", "folio", "sample", "-", "--tokens", "2"]
    done = subprocess.run(
        words, cwd=project, env=environment(), input="The star", capture_output=True, text=True
    )
    assert done.stdout.startswith("The star")


def test_sample_loads_the_model_of_an_mlflow_run(project, store):
    words = ("sample", "The sea", "--tokens", "8", "--seed", "3")
    run_id = tracked(store, project).id
    assert folio(project, *words, "--model", run_id) == folio(project, *words)


def test_page_opens_the_model_of_a_run_with_the_losses_of_its_training(project, store, monkeypatch):
    monkeypatch.chdir(project)
    opened = open_model(tracked(store, project).id)
    losses = ("step", "train_loss", "val_loss")
    assert opened.history == [
        {key: row[key] for key in losses if key in row} for row in read_training(project).history
    ]
    assert opened.model.params.n_layer == 1


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ("sample", "--model", "nothing"),
            "there is no run 'nothing' in MLflow: `python -m folio compare`",
        ),
        (
            ("sample", "--model", "models:/folio@none"),
            "is not registered: `python -m folio promote`",
        ),
        (("sample", "--model", "models:/folio"), "models:/folio@champion or models:/folio/1"),
        (("sample", ""), "the prompt is empty"),
        (("sample", "--temperature", "inf"), "--temperature is inf: give a number"),
        (("serve", "--allow-host", "http://x"), "'http://x' is not a host name"),
        (("sample", "--model", "data"), "there is no model in data"),
        (("compare", ""), "the name of a run is missing"),
        (("sample", "--model", "no/such/folder"), "there is no folder no/such/folder"),
        (("compare", "nothing"), "there is no run 'nothing' in MLflow"),
        (("promote", "nothing"), "there is no run 'nothing' in MLflow"),
        (("serve", "--model", "models:/folio@none"), "is not registered"),
    ],
)
def test_missing_models_and_runs_are_reported_on_one_line(
    project, store, monkeypatch, words, message
):
    monkeypatch.chdir(project)
    error = CliRunner().invoke(commands, words).exception
    assert isinstance(error, UserError) and message in str(error)
    assert "\n" not in str(error)


def test_user_errors_go_to_stderr_with_exit_status_1(project):
    done = process(project, "sample", "--model", "models:/folio@none")
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.strip() == (
        "folio: models:/folio@none is not registered: `python -m folio promote` registers a model"
    )


def test_compare_without_a_store_says_what_creates_one(tmp_path, project):
    shutil.copy(project / "params.yaml", tmp_path)
    words = [sys.executable, "-m", "folio", "compare"]
    done = subprocess.run(
        words, cwd=tmp_path, env=environment(project), capture_output=True, text=True
    )
    assert done.stderr.strip() == (
        "folio: there is no MLflow store yet: `dvc repro` or `python -m folio sync` creates one"
    )
    assert not (tmp_path / "mlflow.db").exists()


def test_compare_shows_runs_side_by_side_or_the_best_first(project, store):
    first, second = tracked(store, project), send_copy(store, project, 99.5)
    table = process(project, "compare", first.id, second).stdout
    assert "validation loss" in table and "99.5000" in table and f"{first.loss:.4f}" in table
    rows = folio(project, "compare").splitlines()
    places = [next(i for i, row in enumerate(rows) if n in row) for n in (first.name, "loss 99.5")]
    assert places == sorted(places)


def test_compare_says_how_many_runs_it_leaves_out(project, store):
    send_copy(store, project, 98.5)
    count = len(queries.list_runs(store))
    assert f"{count - 1} more: --best {count} shows all" in folio(project, "compare", "--best", "1")


def test_compare_shows_a_name_with_brackets_unchanged(project, store):
    run_id = send_copy(store, project, 77.0)
    store.client.update_run(run_id, name="a[/b] [red]x")
    assert "a[/b] [red]x" in folio(project, "compare", run_id, run_id)


def test_promote_makes_only_a_run_with_a_lower_loss_the_champion(project, store):
    worse, better = send_copy(store, project, 8.5), send_copy(store, project, 8.25)
    assert promote_run(store, worse).endswith("is now the champion: there was none before")
    assert promote_run(store, worse).endswith("is already the champion")
    assert promote_run(store, better).endswith(
        "is now the champion: 0.2500 nats/token lower than version 1 on the same validation text"
    )
    assert "remains the champion: its validation loss, 8.2500" in promote_run(store, worse)
    elsewhere = send_copy(store, project, 1.0, held_out_digest="other")
    assert "the losses are not comparable" in promote_run(store, elsewhere)
    assert registry.champion(store)[0].id == better
    forced = promote_run(store, elsewhere, force=True)
    assert "forced, although the losses are not comparable" in forced
    assert registry.champion(store)[0].id == elsewhere
    assert len(store.client.search_model_versions("name = 'folio'")) == 3


def test_promote_of_two_runs_at_once_leaves_the_better_one(project, store, monkeypatch):
    ids = [send_copy(store, project, loss) for loss in (0.26, 0.25)]
    champion, deciding = registry.champion, threading.Event()

    def slowly(store: Store) -> tuple:
        found = champion(store)
        deciding.set()
        time.sleep(0.5)
        return found

    monkeypatch.setattr(registry, "champion", slowly)
    with ThreadPoolExecutor() as both:
        # The worse one starts first, and the other one while the first is deciding.
        first = both.submit(promote_run, Store(None), ids[0], True)
        assert deciding.wait(60)
        both.submit(promote_run, Store(None), ids[1], False).result()
        first.result()
    assert champion(store)[0].loss == 0.25


def test_promote_rejects_a_training_that_has_not_finished(project, store):
    record = dataclasses.replace(read_training(project).record, id=new_id(), name="half")
    RunWriter(store).send(Run(record=record), "RUNNING")
    with pytest.raises(UserError, match="half is RUNNING: only a finished run can be promoted"):
        promote_run(store, record.id)


def test_promote_without_a_name_takes_the_run_of_models_gpt2(project, store, monkeypatch):
    assert folio(project, "promote", "--force").startswith(tracked(store, project).name)
    monkeypatch.setattr(queries, "all_runs", lambda _: {})
    with pytest.raises(UserError, match="the run that trained models/gpt2 is not in MLflow"):
        folio(project, "promote")


def test_registry_does_not_take_a_failing_store_for_an_empty_one(store, monkeypatch):
    def refuse(*_: str) -> None:
        raise mlflow.MlflowException("read timed out")

    monkeypatch.setattr(store.client, "get_model_version_by_alias", refuse)
    with pytest.raises(mlflow.MlflowException, match="timed out"):
        registry.champion(store)
    with pytest.raises(mlflow.MlflowException, match="timed out"):
        registry.registered_model_id(store, "models:/folio@champion")


def test_registry_logs_a_model_once_and_replaces_an_incomplete_one(project, store):
    trained, run_id = read_training(project), tracked(store, project).id

    def models() -> list[tuple[str, str]]:
        return [(m.model_id, m.status) for m in logged_models.find_all(store, run_id)]

    [(first, _)] = models()
    RunWriter(store).send(trained, "FINISHED")
    assert models() == [(first, "READY")]
    store.client.delete_logged_model(first)
    half = store.client.create_logged_model(store.experiment_id, "gpt2", run_id)
    RunWriter(store).send(trained, "FINISHED")
    [(second, status)] = models()
    assert status == "READY" and second not in (first, half.model_id)


def test_sync_restores_a_model_that_mlflow_has_lost(project, store):
    kept = tracked(store, project)
    store.client.delete_logged_model(logged_models.logged_model_id(store, kept))
    assert f"sent {kept.name}" in folio(project, "sync")
    assert logged_models.logged_model_id(store, kept)


def test_experiment_page_is_arranged(store):
    experiment = store.client.get_experiment(store.experiment_id)
    view = json.loads(experiment.tags[ui.TAG])
    assert ui.KEY == "folio" and view["compareRunCharts"][0]["metricKey"] == "val_loss"
    assert experiment.tags["mlflow.experimentKind"] == "custom_model_development"


def test_run_description_states_the_validation_loss(project, store):
    kept = tracked(store, project)
    text = f"**Validation loss {kept.loss:.4f}** nats/token"
    assert text in kept.tags["mlflow.note.content"]


def ask(address: str, body: dict | bytes, **headers: str) -> tuple[int, dict]:
    """Send a request to the scoring server. Returns the status and the answer."""
    headers = {"Content-Type": "application/json"} | headers
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    request = urllib.request.Request(f"{address}/invocations", content, headers)
    try:
        with urllib.request.urlopen(request, timeout=60) as answer:
            return answer.status, json.load(answer)
    except urllib.error.HTTPError as refusal:
        return refusal.code, json.load(refusal)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@contextlib.contextmanager
def open_page(url: str) -> Iterator[Page]:
    """Open a page as a new visitor."""
    browser = next(filter(None, map(shutil.which, ("chromium", "google-chrome"))), None)
    if not browser:
        pytest.skip("this machine has no browser")
    with sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=browser, args=["--no-sandbox"])
        page = started.new_page()
        page.goto(url)
        yield page
        started.close()


def test_ui_prints_the_address_of_the_runs_once_mlflow_answers(project, store):
    """At that address, MLflow does not open the panel of its assistant, as it does on 127.0.0.1."""
    port = free_port()
    server = subprocess.Popen(
        [sys.executable, "-m", "folio", "ui", "--port", str(port)],
        cwd=project,
        env=environment(HTTP_PROXY="http://127.0.0.1:9", FOLIO_ALLOWED_HOSTS="box.example"),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        page = server.stdout.readline()
        base, _, view = page.partition("/#/")
        assert base == f"http://folio.localhost:{port}"
        assert view.startswith(f"experiments/{store.experiment_id}/runs?")
        direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        body = json.dumps({"experiment_ids": [store.experiment_id]}).encode()
        named = f"folio.localhost:{port}"
        for host, status in (("", 200), (named, 200), ("box.example", 200), ("evil.example", 403)):
            headers = {"Content-Type": "application/json"} | ({"Host": host} if host else {})
            address = f"http://127.0.0.1:{port}/api/2.0/mlflow/runs/search"
            request = urllib.request.Request(address, body, headers)
            try:
                with direct.open(request, timeout=30) as answer:
                    assert answer.status == status
                    assert tracked(store, project).id in answer.read().decode()
            except urllib.error.HTTPError as refusal:
                assert refusal.code == status
        hidden = ("MLflow Assistant", "collects usage data")
        with open_page(page) as shown:
            run_name = shown.get_by_text(tracked(store, project).name).first
            expect(run_name).to_be_visible(timeout=60_000)
            for text in hidden:
                expect(shown.get_by_text(text)).to_have_count(0)
        with open_page(f"http://127.0.0.1:{port}") as shown:
            for text in hidden:
                expect(shown.get_by_text(text).first).to_be_visible(timeout=60_000)
        message = process(project, "ui", "--port", str(port)).stderr
        assert message == f"folio: port {port}: Address already in use; choose another --port\n"
    finally:
        os.kill(server.pid, signal.SIGINT)
        errors = server.communicate(timeout=30)[1]
    assert server.returncode == 130 and "the same command starts MLflow again" in errors
    for _ in range(100):  # MLflow's own processes end, too
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)):
                return
        time.sleep(0.1)
    pytest.fail("MLflow is still running")


def test_ui_of_runs_on_a_server_prints_its_address(project, store, monkeypatch):
    monkeypatch.setattr("folio.cli.ui.open_store", lambda: store)
    monkeypatch.setattr(store, "uri", "https://ada:secret@mlflow.example.org/")
    done = CliRunner().invoke(commands, ["ui"])
    address = f"https://mlflow.example.org/#/experiments/{store.experiment_id}/runs?"
    assert done.exit_code == 0 and done.stdout.startswith(address)


def test_serve_answers_with_the_champion_and_rejects_invalid_requests(project, store):
    promote_run(store, send_copy(store, project, 0.5), force=True)
    port = free_port()
    server = subprocess.Popen(
        [sys.executable, "-m", "folio", "serve", "--port", str(port)],
        cwd=project,
        env=environment(HTTP_PROXY="http://127.0.0.1:9", ALL_PROXY="socks5://127.0.0.1:9"),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    address = f"http://127.0.0.1:{port}"
    try:
        for _ in range(300):
            try:
                urllib.request.urlopen(f"{address}/ping", timeout=5)
                break
            except OSError:
                assert server.poll() is None, server.stdout.read()
                time.sleep(0.2)
        params = {"tokens": 4, "seed": 7}
        status, answer = ask(address, {"inputs": ["The sea", "A star"], "params": params})
        assert status == 200 and len(answer["predictions"]) == 2
        words = ("sample", "The sea", "--tokens", "4", "--seed", "7")
        assert "The sea" + answer["predictions"][0] == folio(project, *words)[:-1]
        for body, message in (
            ({"inputs": ["a"], "params": {"tokens": 10**6}}, "1000000; it must be a whole number"),
            ({"inputs": [""]}, "a prompt has 0 characters; it must have 1 to"),
            ({"inputs": ["a"] * 65}, "65 prompts; a request must have 1 to 64"),
            ({"inputs": ["a" * 10_001]}, "a prompt has 10,001 characters"),
            ({"inputs": ["a"], "params": {"top_p": 0.0}}, "top_p is 0, which excludes every token"),
            ({"inputs": [None]}, "prompt 1 is null; it must be a string"),
            ({"inputs": [["KING", "JULIET"]]}, "prompt 1 is a list"),
            ({"inputs": ["a"], "params": {"tokens": "4"}}, "tokens is a string"),
            ({"inputs": ["a"], "params": {"tokenz": 4}}, "'tokenz' is unknown"),
            ({"inputs": ["a"], "params": {"top_p": float("nan")}}, "top_p is out of bounds"),
            (
                {"dataframe_split": {"columns": ["id", "prompt"], "data": [["1", "a"]]}},
                "a table must have exactly one column",
            ),
            (b'{"inputs": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", "nested too deeply"),
            (b"{", "not valid JSON"),
        ):
            status, answer = ask(address, body)
            assert status == 400 and message in answer["message"]
            assert answer.keys() == {"error_code", "message"} and answer["message"].isprintable()
        tiny = {"tokens": 4, "top_p": 1e-50, "seed": 1}
        greedy = {"tokens": 4, "temperature": 0.0}
        answers = [ask(address, {"inputs": ["A star"], "params": p}) for p in (tiny, greedy)]
        assert answers[0] == answers[1] and answers[0][0] == 200
        assert ask(address, {"inputs": ["a"]}, Host="evil.example")[0] == 403
        assert ask(address, {"inputs": ["a"]}, Host=f"localhost:{port}")[0] == 200
    finally:
        os.killpg(server.pid, signal.SIGINT)
        output = server.communicate(timeout=30)[0]
    assert "Traceback" not in output.partition("Finished server")[2]


def test_doctor_finds_no_problem_in_a_valid_project(project):
    output = folio(project, "doctor")
    assert "FAIL" not in output and "ok   params.yaml" in output and "training runs" in output


def test_doctor_reports_each_problem_with_a_hint(make_project):
    folder = make_project(store=False)
    set_params(folder, {"train.seed": ..., "train.sede": 2})
    done = process(folder, "doctor")
    assert done.returncode == 1
    assert "FAIL params.yaml: train.sede: unknown; did you mean train.seed?" in done.stdout
    assert "FAIL there is no git repository here: `git init" in done.stdout
    assert "ok   no MLflow store yet; the first run creates one" in done.stdout


@pytest.mark.parametrize("words", [["stages.train"], ["folio", "compare"]])
@pytest.mark.parametrize("seconds", [0.2, 1.0])
def test_ctrl_c_during_imports_leaves_no_traceback(project, words, seconds):
    command = [sys.executable, "-m", *words]
    with subprocess.Popen(
        command,
        cwd=project,
        env=environment(),
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        time.sleep(seconds)
        process.send_signal(signal.SIGINT)
        stderr = process.communicate(timeout=30)[1]
    assert process.returncode in (-signal.SIGINT, 130) and "Traceback" not in stderr
