"""A training that starts from a GPT-2 folder instead of from random weights."""

import json
import shutil
import subprocess
import sys
import time
from pathlib import Path

import mlflow
import numpy as np
import pytest
import safetensors.torch
import torch
import transformers  # its models are imported when they are used
from conftest import (
    commit,
    enter_copy,
    environment,
    open_store,
    run,
    run_stages,
    set_params,
    succeed,
)
from torch.nn import functional as F

from folio import params, signals
from folio.gpt import huggingface
from folio.tokens import token_files
from folio.tracking import store
from folio.training import pretrained
from folio.errors import one_line_errors
from folio.gpt.model import ModelParams
from folio.run import Record
from folio.runtime import RuntimeParams
from stages import train

SETTINGS = {"train.init_from": "theirs", "train.tie_unseen_tokens": False, "model.block_size": 16}


def write_folder(folder: Path, seed: int = 1, low: bool = False, **sizes: int) -> None:
    """What transformers writes; low: with logits as far below 0 as those of OpenAI's GPT-2."""
    torch.manual_seed(seed)
    known = {"n_layer": 1, "n_head": 2, "n_embd": 16, "n_positions": 32, "vocab_size": 50_257}
    model = transformers.GPT2LMHeadModel(
        transformers.GPT2Config(**known | sizes, initializer_range=0.1)
    )
    if low:
        with torch.no_grad():
            model.transformer.ln_f.bias[0] += 12
            model.transformer.wte.weight[:, 0] -= 10
    model.save_pretrained(folder)


@pytest.fixture(scope="module")
def prepared(make_project) -> Path:
    """A project that starts from data/pretrained/theirs, in which prepare has run."""
    folder = make_project(SETTINGS)
    run_stages(folder, "prepare")
    write_folder(folder / "data/pretrained/theirs")
    return folder


@pytest.fixture(scope="module")
def trained(prepared) -> tuple[Path, str]:
    """A copy of it in which train was killed, and has run again; and what it said then."""
    folder = prepared.with_name("trained")
    shutil.copytree(prepared, folder)
    open_store(folder)
    command = [sys.executable, "-m", "stages.train"]
    with subprocess.Popen(
        command, cwd=folder, env=environment(), stdout=subprocess.DEVNULL
    ) as killed:
        while not list(folder.glob(".checkpoints/*/step-*[0-9]")):
            assert killed.poll() is None
            time.sleep(0.005)
        killed.kill()
    done = run(folder, "python", "-m", "stages.train")
    assert done.returncode == 0, done.stderr
    return folder, done.stdout


@pytest.fixture
def project(prepared, tmp_path, monkeypatch) -> Path:
    """A copy for the test to change."""
    return enter_copy(prepared, tmp_path / "project", monkeypatch)


def trainer(folder: Path) -> train.Trainer:
    model, settings = params.load(
        folder / "params.yaml", model=ModelParams, train=train.TrainParams
    )
    data, start = (
        token_files.read(folder / "data/prepared"),
        pretrained.find(settings.init_from, folder),
    )
    return train.Trainer(model, settings, data, torch.device("cpu"), "fp32", start)


def history(folder: Path) -> list[dict]:
    return [json.loads(row) for row in (folder / "models/training/history.jsonl").open()]


def figures(rows: list[dict]) -> list[list]:
    """What is the same in each run, of a history's rows."""
    keys = ("step", "train_loss", "learning_rate", "grad_norm", "val_loss")
    return [[row.get(key) for key in keys] for row in rows]


def fails(capsys: pytest.CaptureFixture) -> str:
    """Run train where it must stop with one line; return that."""
    capsys.readouterr()
    with pytest.raises(SystemExit), one_line_errors():
        train.main()
    line = capsys.readouterr().err.strip()
    assert "\n" not in line and line.startswith("folio: ")
    return line


# --- before and after


@pytest.mark.parametrize("low", [False, True], ids=["plain", "low logits"])
def test_the_loss_before_training_is_the_one_that_transformers_finds(project, low):
    folder = project / "data/pretrained/theirs"
    write_folder(folder, low=low)
    model = transformers.GPT2LMHeadModel.from_pretrained(folder).eval()
    val = np.fromfile(project / "data/prepared/val.bin", "<u2").astype(np.int64)
    total, highest = 0.0, []
    with torch.no_grad():
        for start in range(0, len(val) - 1, 16):
            window = torch.from_numpy(val[start : start + 17])[None]
            logits = model(window[:, :-1]).logits[0]
            total += float(F.cross_entropy(logits, window[0, 1:], reduction="sum"))
            highest.append(float(logits.max()))
    assert (max(highest) < -50) == low
    assert trainer(project).evaluate() == pytest.approx(total / (len(val) - 1), abs=1e-5)


def test_the_history_begins_with_the_loss_before_training(trained):
    folder, said = trained
    first, second, *_ = history(folder)
    assert first.keys() == {"step", "time", "val_loss"} and second["step"] == 1
    assert first["step"] == 0
    metrics = json.loads((folder / "models/training/metrics.json").read_text())
    assert metrics["initial_val_loss"] == first["val_loss"] == trainer(folder).evaluate()
    assert metrics["best_val_loss"] < first["val_loss"]
    drawn = (folder / "models/training/held_out.csv").read_text().splitlines()
    assert [line.split(",")[0] for line in drawn] == ["step", "0", "2", "4", "6"]
    assert (folder / "models/training/loss.png").stat().st_size > 5_000
    assert "from the weights of data/pretrained/theirs" in said
    before, best = f"{first['val_loss']:.3f}", f"{metrics['best_val_loss']:.3f}"
    assert f"held-out loss {before} before training, {best} at step 6" in said


def test_mlflow_has_the_loss_before_training_and_knows_the_weights(trained):
    folder, _ = trained
    client = mlflow.MlflowClient(f"sqlite:///{folder / 'mlflow.db'}")
    [kept] = client.search_runs([client.get_experiment_by_name("folio").experiment_id])
    points = client.get_metric_history(kept.info.run_id, "val_loss")
    assert sorted((p.step, p.value) for p in points) == [
        (row["step"], row["val_loss"]) for row in history(folder) if "val_loss" in row
    ]
    assert kept.data.metrics["initial_val_loss"] == history(folder)[0]["val_loss"]
    assert kept.data.params["train.init_from"] == "theirs"
    start = pretrained.find("theirs", folder)
    assert kept.data.tags["init_sha256"] == start.sha256


def test_a_training_from_random_weights_has_no_row_of_step_0(project):
    set_params(project, {"train.init_from": "random"})
    one = trainer(project)
    one.train(project / "checkpoints", runtime(), Untracked())
    assert one.history[0]["step"] == 1 and "initial_val_loss" not in one.metrics()


def test_where_no_step_does_better_the_first_weights_are_kept_and_it_is_said(project, capsys):
    set_params(project, {"train.learning_rate": 5.0, "train.min_learning_rate": 5.0})
    train.main()
    metrics = json.loads((project / "models/training/metrics.json").read_text())
    assert metrics["best_step"] == 0
    assert metrics["best_val_loss"] == metrics["initial_val_loss"] < metrics["last_val_loss"]
    said = capsys.readouterr().out
    assert f"step      0  before training      held-out {metrics['best_val_loss']:.3f}" in said
    assert f"no evaluation was better than {metrics['best_val_loss']:.3f}, that of theirs" in said
    kept = huggingface.load(project / "models/gpt2").state_dict()
    theirs = huggingface.load(project / "data/pretrained/theirs").state_dict()
    for name, weight in kept.items():
        assert torch.equal(weight, theirs[name][: len(weight)]), name
    assert len(kept["transformer.wpe.weight"]) == 16


def test_weights_that_are_not_finite_are_one_line_before_any_step(project, capsys):
    path = project / "data/pretrained/theirs/model.safetensors"
    weights = safetensors.torch.load_file(path)
    weights["transformer.ln_f.bias"][0] = float("nan")
    safetensors.torch.save_file(weights, path)
    assert "step 0: the held-out loss is not finite; take another train.init_from" in fails(capsys)


# --- which folder


@pytest.mark.parametrize(
    ("sizes", "words"),
    [
        ({"n_layer": 2}, "set model.n_layer to 2"),
        ({"n_head": 4}, "set model.n_head to 4"),
        ({"n_embd": 32}, "set model.n_embd to 32"),
        ({"n_positions": 8}, "set model.block_size to at most 8"),
        (
            {"n_layer": 3, "n_head": 1, "n_embd": 24, "n_positions": 8},
            "data/pretrained/theirs holds a model of another size: set model.n_layer to 3,"
            " model.n_head to 1, model.n_embd to 24, model.block_size to at most 8",
        ),
        ({"vocab_size": 50_304}, "has 50,304 tokens, and the text is in GPT-2's 50,257: take a"),
    ],
)
def test_a_model_that_does_not_fit_is_one_line_that_says_what_to_set(project, sizes, words, capsys):
    write_folder(project / "data/pretrained/theirs", **sizes)
    assert words in fails(capsys)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"train.init_from": "thiers"}, "'thiers' is no GPT-2 folder in data/pretrained; did you"),
        ({"train.init_from": "data/pretrained/theirs"}, "did you mean theirs?; put one there"),
        ({"train.init_from": "../pretrained/theirs"}, "did you mean theirs?; put one there"),
        ({"train.init_from": "/"}, "put one there (docs/fine-tuning.md) and give its name, or"),
        ({"train.init_from": ""}, "'' is no GPT-2 folder"),
        ({"train.init_from": "\x1b[31m\0" * 10_000}, "is no GPT-2 folder in data/pretrained;"),
        ({"train.init_from": None}, "train.init_from: None will not do; it takes a string"),
        ({"train.tie_unseen_tokens": True}, "train.tie_unseen_tokens: set it to false with init"),
    ],
)
def test_a_name_or_setting_that_will_not_do_is_one_line(project, settings, words, capsys):
    set_params(project, settings)
    line = fails(capsys)
    assert words in line and line.isprintable() and len(line) < 500


def test_a_folder_of_pickled_weights_is_one_line(project, capsys):
    folder = project / "data/pretrained/theirs"
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    assert "pickled weights are not read" in fails(capsys)


def test_a_folder_of_other_weights_is_another_training(project):
    one = trainer(project)
    key = train.train_key(one.model.params, one.p, "data", one.start)
    (project / "data/pretrained/theirs/README.md").write_text("about it")
    same = trainer(project)
    assert train.train_key(same.model.params, same.p, "data", same.start) == key
    write_folder(project / "data/pretrained/theirs", seed=2)
    other = trainer(project)
    assert train.train_key(other.model.params, other.p, "data", other.start) != key


# --- stopped and gone on


class Untracked:
    def follow(self, history):
        pass


def runtime() -> RuntimeParams:
    (loaded,) = params.load(runtime=RuntimeParams)
    return loaded


@pytest.mark.parametrize(
    ("call", "method", "rate"),
    [(1, "evaluate", 0.1), (1, "advance", 0.1), (4, "advance", 0.1), (4, "advance", 5.0)],
    ids=["before the first row", "before the first step", "later", "where no step does better"],
)
def test_a_stopped_training_ends_as_if_it_had_not_been(project, monkeypatch, rate, call, method):
    set_params(project, {"train.learning_rate": rate, "train.min_learning_rate": rate})
    undisturbed = trainer(project)
    undisturbed.train(project / "one", runtime(), Untracked())
    stopped, calls = trainer(project), []
    sound = getattr(stopped, method)

    def stopping_at_a_call():
        calls.append(method)
        if len(calls) == call:
            raise signals.Stopped("SIGTERM")
        return sound()

    monkeypatch.setattr(stopped, method, stopping_at_a_call)
    with pytest.raises(signals.Stopped):
        stopped.train(project / "two", runtime(), Untracked())
    resumed = trainer(project)
    resumed.resume(project / "two")
    assert resumed.step == (call - 1 if method == "advance" else 0)
    resumed.train(project / "two", runtime(), Untracked())
    assert figures(undisturbed.history) == figures(resumed.history)
    assert [row["step"] for row in resumed.history] == [*range(7)]
    assert undisturbed.best == resumed.best and (resumed.best[1] == 0) == (rate == 5.0)
    for name, weight in undisturbed.best_weights.items():
        assert torch.equal(weight, resumed.best_weights[name]), name
    for weight, other in zip(
        undisturbed.model.parameters(), resumed.model.parameters(), strict=True
    ):
        assert torch.equal(weight, other)


def test_a_killed_training_leaves_the_same_files_and_mlflow_has_each_point_once(project, trained):
    folder, said = trained
    assert "going on from the checkpoint of step" in said
    undisturbed = trainer(project)
    undisturbed.train(project / "checkpoints", runtime(), Untracked())
    assert figures(undisturbed.history) == figures(history(folder))
    for name, weight in huggingface.load(folder / "models/gpt2").state_dict().items():
        assert torch.equal(weight, undisturbed.best_weights[name]), name
    client = mlflow.MlflowClient(f"sqlite:///{folder / 'mlflow.db'}")
    [kept] = client.search_runs([client.get_experiment_by_name("folio").experiment_id])
    for key, steps in (("val_loss", [0, 2, 4, 6]), ("train_loss", [1, 2, 3, 4, 5, 6])):
        points = client.get_metric_history(kept.info.run_id, key)
        assert sorted(point.step for point in points) == steps


def test_a_training_goes_on_only_while_its_folder_is_there(project, capsys):
    trainer(project).save(project / ".checkpoints/key")
    shutil.rmtree(project / "data/pretrained/theirs")
    assert "'theirs' is no GPT-2 folder in data/pretrained" in fails(capsys)


def test_a_training_stopped_before_its_first_step_is_sent_by_sync(project):
    store, row = store.Store(None), {"step": 0, "time": 1, "val_loss": 9.5}
    params = {"data.corpus": "verses"}
    record = Record(id="one", name="one", started=1, ended=2, params=params, tags={})
    store.send(store.Run(record=record), "KILLED")
    assert store.lacks(record, [row])
    store.send(store.Run(record=record, history=[row]), "KILLED")
    assert not store.lacks(record, [row])


# --- DVC


def dvc(folder: Path, *command: str) -> tuple[list[str], str]:
    """The stages that it runs, and all that it says."""
    done = run(folder, "dvc", *command)
    assert done.returncode == 0, done.stdout + done.stderr
    lines = done.stdout.splitlines()
    return [line.split("'")[1] for line in lines if line.startswith("Running stage")], done.stdout


def test_dvc_trains_again_when_the_folder_in_use_changes_and_for_no_other(project):
    theirs, dry = project / "data/pretrained/theirs", ("repro", "--dry", "train")
    succeed(project, "git", "init", "-q")
    succeed(project, "dvc", "add", "data/pretrained/theirs")
    commit(project)
    # An experiment in a clone of its own, which has what git and DVC keep and nothing else.
    ran, said = dvc(project, "exp", "run", "--temp", "--name", "tuned")
    assert (
        ran == ["prepare", "train", "evaluate"]
        and "from the weights of data/pretrained/theirs" in said
    )
    dvc(project, "exp", "apply", "tuned")
    write_folder(project / "data/pretrained/another")
    (theirs / ".cache").mkdir()  # as `hf download` leaves one
    (theirs / ".cache/CACHEDIR.TAG").touch()
    assert dvc(project, *dry)[0] == []
    before = (theirs / "model.safetensors").read_bytes()
    write_folder(theirs, seed=2)
    assert dvc(project, *dry)[0] == ["train"]
    (theirs / "model.safetensors").write_bytes(before)
    assert dvc(project, *dry)[0] == []
    set_params(project, {"train.init_from": "another"})
    assert dvc(project, *dry)[0] == ["train"]
    set_params(project, {"train.init_from": "nowhere"})
    refused = run(project, "dvc", *dry)
    assert refused.returncode and "data/pretrained/nowhere" in refused.stderr
