"""`python -m folio` and the models in MLflow, on a training that really ran."""

import dataclasses
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import mlflow
import pytest
from conftest import environment, folio, run, set_params
from typer.testing import CliRunner

from folio.cli import sample
from folio.run import Run, new_id, read_training
from folio.tracking import registry, store
from folio.__main__ import app as commands
from folio.errors import UserError
from folio.gpt.model import GPT, ModelParams
from folio.cli.promote import _why_not, promote
from folio.tracking.ui import KEY, TAG

COMMANDS = sorted(
    command.name or command.callback.__name__ for command in commands.registered_commands
)


@pytest.fixture(scope="module")
def project(make_trained) -> Path:
    """A project whose stages have run once."""
    return make_trained()


@pytest.fixture
def store(project, monkeypatch) -> store.Store:
    monkeypatch.setenv("DVC_ROOT", str(project))
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    return store.Store(None)


def process(folder: Path, *words: str) -> subprocess.CompletedProcess:
    return run(folder, sys.executable, "-m", "folio", *words)


def another(project: Path, store: store.Store, loss: float, **tags: str) -> str:
    """Send a training of that held-out loss, with the project's model. Returns its id."""
    trained = read_training(project)
    record = dataclasses.replace(
        trained.record, id=new_id(), name=f"loss {loss}", tags=trained.record.tags | tags
    )
    figures = trained.figures | {"best_val_loss": loss}
    store.send(dataclasses.replace(trained, record=record, figures=figures), "FINISHED")
    return store.run(record.id).id


def test_the_commands_are_listed_without_pytorch_and_mlflow():
    code = "import sys, folio.__main__; sys.exit(bool({'torch', 'mlflow'} & sys.modules.keys()))"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_s_help_has_an_example_of_it(command):
    said = CliRunner().invoke(commands, [command, "--help"]).output
    assert f"Example: python -m folio {command}" in said


def test_the_same_seed_writes_the_same_text(project):
    texts = [process(project, "sample", "The sea", "--tokens", "8", "--seed", "3") for _ in "ab"]
    assert texts[0].stdout == texts[1].stdout != "The sea\n"
    assert texts[0].stdout.startswith("The sea") and "seed 3, " in texts[0].stderr


def test_a_temperature_next_to_nothing_is_nothing(project):
    texts = [
        folio(project, "sample", "The sea", "--tokens", "8", "--temperature", t)
        for t in ("0", "1e-320")
    ]
    assert texts[0] == texts[1] != ""


def test_a_terminal_that_lacks_a_character_gets_another(project):
    words = [sys.executable, "-m", "folio", "sample", "“é”", "--tokens", "1"]
    done = run(project, *words, PYTHONIOENCODING="ascii")
    assert done.returncode == 0 and done.stdout.startswith("???")


def test_a_terminal_gets_nothing_that_it_would_obey():
    assert sample._harmless("a\x1b[2J\tb\n“é”") == "a\\x1b[2J\tb\n“é”"


def test_a_prompt_of_tokens_that_the_model_lacks_is_one_line():
    sizes = {"n_layer": 1, "n_head": 1, "n_embd": 8, "block_size": 8}
    with pytest.raises(UserError, match="this model has 100 tokens, and the prompt others"):
        sample.encode(GPT(ModelParams(**sizes, dropout=0.0), 100), "To be")


def test_a_prompt_may_come_through_a_pipe(project):
    words = [sys.executable, "-m", "folio", "sample", "-", "--tokens", "2"]
    done = subprocess.run(
        words, cwd=project, env=environment(), input="The star", capture_output=True, text=True
    )
    assert done.stdout.startswith("The star")


def test_a_model_comes_from_its_run_in_mlflow(project, store):
    [kept] = [kept for kept in store.runs() if kept.folio_id == read_training(project).record.id]
    words = ("sample", "The sea", "--tokens", "8", "--seed", "3")
    assert folio(project, *words, "--model", kept.id) == folio(project, *words)


def test_the_page_opens_a_run_s_model_with_the_losses_of_its_training(project, store, monkeypatch):
    import app

    monkeypatch.chdir(project)
    trained = read_training(project)
    opened = app.open_model(store.run(trained.record.id).id)
    losses = ("step", "train_loss", "val_loss")
    assert opened.history == [
        {key: row[key] for key in losses if key in row} for row in trained.history
    ]
    assert opened.model.params.n_layer == 1


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (
            ("sample", "--model", "nothing"),
            "MLflow has no run 'nothing': `python -m folio compare`",
        ),
        (
            ("sample", "--model", "models:/folio@none"),
            "is not registered: `python -m folio promote`",
        ),
        (("sample", "--model", "models:/folio"), "give models:/folio@champion or models:/folio/1"),
        (("sample", ""), "the prompt is empty"),
        (("sample", "--model", "data"), "holds no model"),
        (("compare", ""), "which run?"),
        (("sample", "--model", "no/such/folder"), "there is no folder no/such/folder"),
        (("compare", "nothing"), "MLflow has no run 'nothing'"),
        (("promote", "nothing"), "MLflow has no run 'nothing'"),
        (("serve", "--model", "models:/folio@none"), "is not registered"),
    ],
)
def test_what_is_not_there_is_one_line(project, store, monkeypatch, words, line):
    monkeypatch.chdir(project)
    said = CliRunner().invoke(commands, words).exception
    assert isinstance(said, UserError) and line in str(said)
    assert "\n" not in str(said)


def test_a_line_for_the_user_is_on_stderr_with_an_exit_status(project):
    done = process(project, "sample", "--model", "models:/folio@none")
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.strip() == (
        "folio: models:/folio@none is not registered: `python -m folio promote` does that"
    )


def test_without_a_store_the_line_says_what_makes_one(tmp_path, project):
    shutil.copy(project / "params.yaml", tmp_path)
    words = [sys.executable, "-m", "folio", "compare"]
    done = subprocess.run(
        words, cwd=tmp_path, env=environment(project), capture_output=True, text=True
    )
    assert done.stderr.strip() == (
        "folio: there is no MLflow store yet: `dvc repro` makes one, or `python -m folio sync`"
    )
    assert not (tmp_path / "mlflow.db").exists()


def test_runs_are_compared_side_by_side(project, store):
    first = store.run(read_training(project).record.id)
    second = another(project, store, 99.5)
    table = process(project, "compare", first.id, second).stdout
    assert "held-out loss" in table and "99.5000" in table and f"{first.loss:.4f}" in table
    rows = folio(project, "compare").splitlines()
    places = [next(i for i, row in enumerate(rows) if n in row) for n in (first.name, "loss 99.5")]
    assert places == sorted(places)  # the best first


def test_only_a_lower_held_out_loss_makes_another_champion(project, store):
    worse, better = another(project, store, 8.5), another(project, store, 8.25)
    assert promote(store, worse).endswith("is the champion now: there was none")
    assert promote(store, worse).endswith("is the champion already")
    assert promote(store, better).endswith(
        "is the champion now: 0.2500 nats a token below version 1, on the same held-out text"
    )
    assert "stays the champion: its held-out loss, 8.2500" in promote(store, worse)
    elsewhere = another(project, store, 1.0, held_out_digest="other")
    assert "not measured on the same held-out text" in promote(store, elsewhere)
    assert store.champion()[0].id == better
    assert "forced, though they were not measured" in promote(store, elsewhere, force=True)
    assert store.champion()[0].id == elsewhere
    versions = mlflow.MlflowClient(store.address).search_model_versions("name = 'folio'")
    assert len(versions) == 3


def test_of_two_promoted_at_once_the_better_is_the_champion(project, store, monkeypatch):
    ids, read = [another(project, store, loss) for loss in (0.26, 0.25)], store.Store.champion

    def slowly(self: store.Store) -> tuple:
        found = read(self)
        time.sleep(0.5)
        return found

    monkeypatch.setattr(store.Store, "champion", slowly)
    with ThreadPoolExecutor() as both:
        # the worse one first, and the other while it decides
        first = both.submit(promote, store.Store(None), ids[0], True)
        time.sleep(0.1)
        both.submit(promote, store.Store(None), ids[1], False).result()
        first.result()
    assert read(store)[0].loss == 0.25


def test_a_store_that_does_not_answer_has_no_champion_to_replace(store, monkeypatch):
    def refuse(*_: str) -> None:
        raise mlflow.MlflowException("read timed out")

    client = mlflow.MlflowClient(store.address)
    monkeypatch.setattr(client, "get_model_version_by_alias", refuse)
    with pytest.raises(mlflow.MlflowException, match="timed out"):
        registry.champion(client)
    with pytest.raises(mlflow.MlflowException, match="timed out"):
        registry.registered(client, "models:/folio@champion")


def test_losses_on_unknown_texts_do_not_compare():
    def kept(loss: float) -> store.TrackedRun:
        empty = dict.fromkeys(("id", "folio_id", "name", "experiment", "status"), "")
        metrics = {"best_val_loss": loss}
        return store.TrackedRun(**empty, started=0, ended=1, params={}, metrics=metrics, tags={})

    assert "not measured on the same held-out text" in _why_not(kept(1.0), kept(2.0))


def test_sync_brings_back_a_model_that_mlflow_has_lost(project, store):
    trained = read_training(project)
    [experiment] = mlflow.MlflowClient(store.address).search_experiments(
        filter_string="name = 'folio'"
    )
    client, run_id = mlflow.MlflowClient(store.address), store.run(trained.record.id).id
    client.delete_logged_model(registry.of_run(client, experiment.experiment_id, run_id))
    assert f"sent {trained.record.name}" in folio(project, "sync")
    assert registry.of_run(client, experiment.experiment_id, run_id)


def test_a_name_with_brackets_is_shown_as_it_is(project, store):
    name = another(project, store, 77.0)
    mlflow.MlflowClient(store.address).update_run(name, name="a[/b] [red]x")
    assert "a[/b] [red]x" in folio(project, "compare", name, name)


def test_a_training_that_has_not_ended_is_not_promoted(project, store):
    record = dataclasses.replace(read_training(project).record, id=new_id(), name="half")
    store.send(Run(record=record), "RUNNING")
    with pytest.raises(UserError, match="half is RUNNING: only a finished training is promoted"):
        promote(store, record.id)


def test_a_model_is_logged_once_and_one_left_half_is_replaced(project, store):
    trained = read_training(project)
    client = mlflow.MlflowClient(store.address)
    [experiment] = [e.experiment_id for e in client.search_experiments() if e.name == "folio"]

    def models() -> list[str]:
        found = registry._of_run(client, experiment, store.run(trained.record.id).id)
        return [(model.model_id, model.status) for model in found]

    [(first, _)] = models()
    store.send(trained, "FINISHED")
    assert models() == [(first, "READY")]
    client.delete_logged_model(first)
    half = client.create_logged_model(experiment, "gpt2", store.run(trained.record.id).id)
    store.send(trained, "FINISHED")
    [(second, status)] = models()
    assert status == "READY" and second not in (first, half.model_id)


def test_the_experiment_s_page_is_arranged(store):
    [experiment] = mlflow.MlflowClient(store.address).search_experiments(
        filter_string="name = 'folio'"
    )
    view = json.loads(experiment.tags[TAG])
    assert KEY == "folio" and view["compareRunCharts"][0]["metricKey"] == "val_loss"
    assert experiment.tags["mlflow.experimentKind"] == "custom_model_development"


def test_a_run_s_description_says_its_loss(project, store):
    kept = store.run(read_training(project).record.id)
    assert f"**Held-out loss {kept.loss:.4f}** nats a token" in kept.tags["mlflow.note.content"]


def ask(address: str, body: dict) -> tuple[int, dict]:
    """A request to the scoring server: the status and the answer."""
    headers = {"Content-Type": "application/json"}
    request = urllib.request.Request(f"{address}/invocations", json.dumps(body).encode(), headers)
    try:
        with urllib.request.urlopen(request, timeout=60) as answer:
            return answer.status, json.load(answer)
    except urllib.error.HTTPError as refusal:
        return refusal.code, json.load(refusal)


def test_the_champion_is_served_and_its_bounds_hold(project, store):
    promote(store, another(project, store, 0.5), force=True)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    server = subprocess.Popen(
        [sys.executable, "-m", "folio", "serve", "--port", str(port)],
        cwd=project,
        env=environment(),
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
        for body, why in (
            ({"inputs": ["a"], "params": {"tokens": 10**6}}, "tokens is 1000000; it takes 1 to"),
            ({"inputs": [""]}, "0 characters; a prompt takes 1 to"),
            ({"inputs": ["a"] * 65}, "65 prompts; a request takes 1 to 64"),
            ({"inputs": ["a" * 10_001]}, "10001 characters"),
            ({"inputs": ["a"], "params": {"top_p": 0.0}}, "top_p: 0 leaves no token"),
        ):
            status, answer = ask(address, body)
            assert status == 400 and why in answer["message"]
    finally:
        os.killpg(server.pid, signal.SIGINT)
        said = server.communicate(timeout=30)[0]
    assert "Traceback" not in said.partition("Finished server")[2]


def test_the_doctor_finds_all_well_in_a_project_that_is(project):
    said = folio(project, "doctor")
    assert "OFF" not in said and "ok  params.yaml" in said and "trainings" in said


def test_the_doctor_names_what_is_off_and_the_way_out(make_project):
    folder = make_project(store=False)
    set_params(folder, {"train.seed": ..., "train.sede": 2})
    done = process(folder, "doctor")
    assert done.returncode == 1
    assert "OFF params.yaml: train.sede: unknown; did you mean train.seed?" in done.stdout
    assert "OFF no git commit: `git init" in done.stdout
    assert "ok  no MLflow store yet; the first run makes one" in done.stdout


@pytest.mark.parametrize("words", [["stages.train"], ["folio", "compare"]])
@pytest.mark.parametrize("seconds", [0.2, 1.0])
def test_ctrl_c_while_it_imports_leaves_no_traceback(project, words, seconds):
    command = [sys.executable, "-m", *words]
    with subprocess.Popen(
        command,
        cwd=project,
        env=environment(),
        stderr=subprocess.PIPE,
        text=True,
        # The tests themselves may run in a background that ignores Ctrl-C.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    ) as process:
        time.sleep(seconds)
        process.send_signal(signal.SIGINT)
        said = process.communicate(timeout=30)[1]
    assert process.returncode in (-signal.SIGINT, 130) and "Traceback" not in said
