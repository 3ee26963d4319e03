"""Training that starts from a GPT-2 folder instead of random weights."""

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
from folio.errors import UserError, one_line_errors
from folio.gpt import huggingface
from folio.gpt.model import ModelParams
from folio.run import Record, Run
from folio.runtime import RuntimeParams
from folio.tokens import token_files
from folio.tracking import queries
from folio.tracking.logger import NoLogger
from folio.tracking.store import Store
from folio.tracking.writer import RunWriter
from folio.training import pretrained
from folio.training.key import train_key
from folio.training.outputs import metrics as training_metrics
from folio.training.params import TrainParams
from folio.training.trainer import Trainer
from stages import train

SETTINGS = {"train.init_from": "theirs", "train.tie_unseen_tokens": False, "model.block_size": 16}


def write_folder(folder: Path, seed: int = 1, low: bool = False, **sizes: int) -> None:
    """Write a folder with transformers; low: with logits far below 0, like OpenAI's GPT-2."""
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
    """A project with init_from data/pretrained/theirs, in which prepare has run."""
    folder = make_project(SETTINGS)
    run_stages(folder, "prepare")
    write_folder(folder / "data/pretrained/theirs")
    return folder


@pytest.fixture(scope="module")
def trained(prepared) -> tuple[Path, str]:
    """A copy in which train was killed and resumed; and the stdout of the second run."""
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


def trainer(folder: Path) -> Trainer:
    model, settings = params.load(folder / "params.yaml", model=ModelParams, train=TrainParams)
    data = token_files.read(folder / "data/prepared")
    weights = pretrained.find(settings.init_from, folder)
    return Trainer(model, settings, data, torch.device("cpu"), "fp32", weights)


def history(folder: Path) -> list[dict]:
    return [json.loads(row) for row in (folder / "models/training/history.jsonl").open()]


def figures(rows: list[dict]) -> list[list]:
    """The rows of a history without what depends on the clock."""
    keys = ("step", "train_loss", "learning_rate", "grad_norm", "val_loss")
    return [[row.get(key) for key in keys] for row in rows]


def fails(capsys: pytest.CaptureFixture) -> str:
    """Run train, which must fail with one line; return it."""
    capsys.readouterr()
    with pytest.raises(SystemExit), one_line_errors():
        train.main()
    line = capsys.readouterr().err.strip()
    assert "\n" not in line and line.startswith("folio: ")
    return line


# --- before and after


@pytest.mark.parametrize("low", [False, True], ids=["plain", "low logits"])
def test_loss_before_training_is_that_of_transformers(project, low):
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
    assert trainer(project).validate() == pytest.approx(total / (len(val) - 1), abs=1e-5)


def test_history_starts_with_loss_before_training(trained):
    folder, said = trained
    first, second, *_ = history(folder)
    assert first.keys() == {"step", "time", "val_loss"} and second["step"] == 1
    assert first["step"] == 0
    metrics = json.loads((folder / "models/training/metrics.json").read_text())
    assert metrics["initial_val_loss"] == first["val_loss"] == trainer(folder).validate()
    assert metrics["best_val_loss"] < first["val_loss"]
    drawn = (folder / "models/training/val_loss.csv").read_text().splitlines()
    assert [line.split(",")[0] for line in drawn] == ["step", "0", "2", "4", "6"]
    assert "starting from data/pretrained/theirs" in said
    before, best = f"{first['val_loss']:.3f}", f"{metrics['best_val_loss']:.3f}"
    assert f"of step 6: validation loss {best}, {before} before training" in said


def test_mlflow_has_loss_before_training_and_hash_of_weights(trained):
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


def test_history_from_random_weights_has_no_step_0(project):
    set_params(project, {"train.init_from": "random"})
    one = trainer(project)
    train.train(one, runtime(), project / "checkpoints", NoLogger())
    assert one.history.rows[0]["step"] == 1 and "initial_val_loss" not in training_metrics(one)


def test_initial_weights_are_kept_when_no_step_improves_on_them(project, capsys):
    set_params(project, {"train.learning_rate": 5.0, "train.min_learning_rate": 5.0})
    train.main()
    metrics = json.loads((project / "models/training/metrics.json").read_text())
    assert metrics["best_step"] == 0
    assert metrics["best_val_loss"] == metrics["initial_val_loss"] < metrics["last_val_loss"]
    said = capsys.readouterr().out
    assert (
        f"step      0  before training     validation loss {metrics['best_val_loss']:.3f}" in said
    )
    assert (
        f"no evaluation was better than {metrics['best_val_loss']:.3f}, the validation loss" in said
    )
    kept = huggingface.load(project / "models/gpt2").state_dict()
    theirs = huggingface.load(project / "data/pretrained/theirs").state_dict()
    for name, weight in kept.items():
        assert torch.equal(weight, theirs[name][: len(weight)]), name
    assert len(kept["transformer.wpe.weight"]) == 16


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ("nan", "transformer.ln_f.bias has values that are NaN or infinite"),
        ("-inf", "transformer.ln_f.bias has values that are NaN or infinite"),
        ("3e38", "step 0: the validation loss is not finite; choose another train.init_from"),
    ],
)
def test_non_finite_weights_fail_in_one_line_before_any_step(project, capsys, value, words):
    path = project / "data/pretrained/theirs/model.safetensors"
    weights = safetensors.torch.load_file(path)
    weights["transformer.ln_f.bias"][:] = float(value)
    safetensors.torch.save_file(weights, path)
    assert words in fails(capsys)


def test_sharded_weights_are_those_of_one_file(project):
    folder = project / "data/pretrained/theirs"
    one = trainer(project)
    transformers.GPT2LMHeadModel.from_pretrained(folder).save_pretrained(
        folder.parent / "sharded", max_shard_size="200KB"
    )
    assert len(list((folder.parent / "sharded").glob("*.safetensors"))) > 1
    set_params(project, {"train.init_from": "sharded"})
    other = trainer(project)
    assert other.pretrained.sha256 not in ("", one.pretrained.sha256)
    assert one.validate() == other.validate()
    assert all(map(torch.equal, one.model.parameters(), other.model.parameters()))


def test_key_changes_with_any_shard_of_the_weights(project):
    folder = project / "data/pretrained/theirs"
    transformers.GPT2LMHeadModel.from_pretrained(folder).save_pretrained(
        folder.parent / "sharded", max_shard_size="200KB"
    )
    keys = []
    for path in [None, *(folder.parent / "sharded").glob("*.safetensors")]:
        if path:
            tensors = safetensors.torch.load_file(path)
            safetensors.torch.save_file({n: t + 1e-3 for n, t in tensors.items()}, path)
        set_params(project, {"train.init_from": "sharded"})
        weights = pretrained.find("sharded", project)
        one = trainer(project)
        keys.append(train_key(one.model.params, one.params, "data", weights))
    assert len(set(keys)) == len(keys) > 2


def test_weights_that_are_replaced_after_they_were_found_are_an_error(project):
    found = pretrained.find("theirs", project)
    write_folder(found.path, seed=2)
    model = ModelParams(n_layer=1, n_head=2, n_embd=16, block_size=16, dropout=0.0)
    with pytest.raises(UserError, match="data/pretrained/theirs changed while it was being read"):
        found.weights(model, 50_257)


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
            "data/pretrained/theirs has a model of a different size: set model.n_layer to 3,"
            " model.n_head to 1, model.n_embd to 24, model.block_size to at most 8",
        ),
        (
            {"vocab_size": 50_304},
            "has 50,304 tokens, but the text is encoded with GPT-2's 50,257: choose a",
        ),
    ],
)
def test_folder_of_another_size_fails_in_one_line_with_what_to_set(project, sizes, words, capsys):
    write_folder(project / "data/pretrained/theirs", **sizes)
    assert words in fails(capsys)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (
            {"train.init_from": "thiers"},
            "'thiers' is not a GPT-2 folder in data/pretrained: put one there (docs/",
        ),
        ({"train.init_from": "data/pretrained/theirs"}, "or use random; did you mean theirs?"),
        ({"train.init_from": "../pretrained/theirs"}, "or use random; did you mean theirs?"),
        ({"train.init_from": "/"}, "put one there (docs/fine-tuning.md) and use its name, or"),
        ({"train.init_from": ""}, "'' is not a GPT-2 folder"),
        ({"train.init_from": "\x1b[31m\0" * 10_000}, "is not a GPT-2 folder in data/pretrained:"),
        ({"train.init_from": None}, "train.init_from: None is not valid; expected a string"),
        ({"train.tie_unseen_tokens": True}, "train.tie_unseen_tokens: must be false with init"),
    ],
)
def test_invalid_name_or_setting_fails_in_one_line(project, settings, words, capsys):
    set_params(project, settings)
    line = fails(capsys)
    assert words in line and line.isprintable() and len(line) < 500


def test_pickled_weights_fail_in_one_line(project, capsys):
    folder = project / "data/pretrained/theirs"
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    assert "Folio does not read pickled weights" in fails(capsys)


def test_key_changes_with_weights_of_the_folder(project):
    one = trainer(project)
    key = train_key(one.model.params, one.params, "data", one.pretrained)
    (project / "data/pretrained/theirs/README.md").write_text("about it")
    same = trainer(project)
    assert train_key(same.model.params, same.params, "data", same.pretrained) == key
    write_folder(project / "data/pretrained/theirs", seed=2)
    other = trainer(project)
    assert train_key(other.model.params, other.params, "data", other.pretrained) != key


# --- stopped and resumed


def runtime() -> RuntimeParams:
    (loaded,) = params.load(runtime=RuntimeParams)
    return loaded


@pytest.mark.parametrize(
    ("call", "method", "rate"),
    [
        (1, "validate", 0.1),
        (1, "step", 0.1),
        (4, "step", 0.1),
        (4, "step", 5.0),
        (3, "validate", 0.1),
    ],
    ids=["before the first row", "before the first step", "later", "no improvement", "evaluation"],
)
def test_stopped_training_resumes_bit_for_bit(project, monkeypatch, rate, call, method):
    set_params(project, {"train.learning_rate": rate, "train.min_learning_rate": rate})
    uninterrupted = trainer(project)
    train.train(uninterrupted, runtime(), project / "one", NoLogger())
    stopped, calls = trainer(project), []
    sound = getattr(stopped, method)

    def stopping_at_a_call(*arguments):
        calls.append(method)
        if len(calls) == call:
            raise signals.Stopped("SIGTERM")
        return sound(*arguments)

    monkeypatch.setattr(stopped, method, stopping_at_a_call)
    with pytest.raises(signals.Stopped):
        train.train(stopped, runtime(), project / "two", NoLogger())
    resumed = trainer(project)
    resumed.resume(project / "two")
    assert resumed.steps_done == (call - 1 if method == "step" else 2 * (call - 1))
    train.train(resumed, runtime(), project / "two", NoLogger())
    assert figures(uninterrupted.history.rows) == figures(resumed.history.rows)
    assert [row["step"] for row in resumed.history.rows] == [*range(7)]
    best, resumed_best = uninterrupted.early_stopping, resumed.early_stopping
    assert best.state_dict() == resumed_best.state_dict()
    assert (resumed_best.best_step == 0) == (rate == 5.0)
    for name, weight in best.best_weights.items():
        assert torch.equal(weight, resumed_best.best_weights[name]), name
    for weight, other in zip(
        uninterrupted.model.parameters(), resumed.model.parameters(), strict=True
    ):
        assert torch.equal(weight, other)


def test_killed_training_leaves_same_files_and_each_point_once(project, trained):
    folder, said = trained
    assert "resuming from the checkpoint of step" in said
    uninterrupted = trainer(project)
    train.train(uninterrupted, runtime(), project / "checkpoints", NoLogger())
    assert figures(uninterrupted.history.rows) == figures(history(folder))
    for name, weight in huggingface.load(folder / "models/gpt2").state_dict().items():
        assert torch.equal(weight, uninterrupted.early_stopping.best_weights[name]), name
    client = mlflow.MlflowClient(f"sqlite:///{folder / 'mlflow.db'}")
    [kept] = client.search_runs([client.get_experiment_by_name("folio").experiment_id])
    for key, steps in (("val_loss", [0, 2, 4, 6]), ("train_loss", [1, 2, 3, 4, 5, 6])):
        points = client.get_metric_history(kept.info.run_id, key)
        assert sorted(point.step for point in points) == steps


def test_training_does_not_resume_without_its_folder(project, capsys):
    trainer(project).save(project / ".checkpoints/key")
    shutil.rmtree(project / "data/pretrained/theirs")
    assert "'theirs' is not a GPT-2 folder in data/pretrained" in fails(capsys)


def test_sync_sends_training_stopped_before_its_first_step(project):
    store, row = Store(None), {"step": 0, "time": 1, "val_loss": 9.5}
    params = {"data.corpus": "verses"}
    record = Record(id="one", name="one", started=1, ended=2, params=params, tags={})
    writer = RunWriter(store)
    writer.send(Run(record=record), "KILLED")
    assert queries.is_outdated(store, record, [row])
    writer.send(Run(record=record, history=[row]), "KILLED")
    assert not queries.is_outdated(store, record, [row])


# --- DVC


def dvc(folder: Path, *command: str) -> tuple[list[str], str]:
    """Run dvc; return the stages that it ran, and its stdout."""
    done = run(folder, "dvc", *command)
    assert done.returncode == 0, done.stdout + done.stderr
    lines = done.stdout.splitlines()
    return [line.split("'")[1] for line in lines if line.startswith("Running stage")], done.stdout


def test_dvc_retrains_only_when_the_folder_in_use_changes(project):
    theirs, dry = project / "data/pretrained/theirs", ("repro", "--dry", "train")
    succeed(project, "git", "init", "-q")
    succeed(project, "dvc", "add", "data/pretrained/theirs")
    commit(project)
    # An experiment in a clone of its own, which has what git and DVC keep and nothing else.
    ran, said = dvc(project, "exp", "run", "--temp", "--name", "tuned")
    assert (
        ran == ["check", "check_pretrained", "prepare", "train", "evaluate"]
        and "starting from data/pretrained/theirs" in said
    )
    dvc(project, "exp", "apply", "tuned")
    write_folder(project / "data/pretrained/another")
    (theirs / ".cache").mkdir()  # as `hf download` leaves one
    (theirs / ".cache/CACHEDIR.TAG").touch()
    assert dvc(project, *dry)[0] == []
    before = (theirs / "model.safetensors").read_bytes()
    write_folder(theirs, seed=2)
    assert dvc(project, *dry)[0] == ["check_pretrained", "train"]
    (theirs / "model.safetensors").write_bytes(before)
    assert dvc(project, *dry)[0] == []
    set_params(project, {"train.init_from": "another"})
    assert dvc(project, *dry)[0] == ["check", "check_pretrained", "train"]
    set_params(project, {"train.init_from": "nowhere"})
    refused = run(project, "dvc", *dry)
    assert refused.returncode and "data/pretrained/nowhere" in refused.stderr
