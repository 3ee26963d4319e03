"""The whole pipeline in a real DVC repository with a real MLflow store."""

import json
import re
import subprocess
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import mlflow
import psutil
import pytest
import torch
from conftest import ROOT, environment, run, set_params

from folio import files


@pytest.fixture(scope="module")
def repo(make_trained) -> Path:
    """A committed repository in which `dvc repro` has run."""
    return make_trained()


@pytest.fixture
def store(repo: Path) -> mlflow.MlflowClient:
    return mlflow.MlflowClient(f"sqlite:///{repo / 'mlflow.db'}")


def runs_of(store: mlflow.MlflowClient, key: str) -> tuple[list, list]:
    """The training runs with a train_key, and the evaluation runs nested under them."""
    experiment = store.get_experiment_by_name("folio")
    found = store.search_runs([experiment.experiment_id], f"tags.train_key = '{key}'")
    nested = [r for r in found if "mlflow.parentRunId" in r.data.tags]
    return [r for r in found if r not in nested], nested


def written(repo: Path, file: str) -> dict:
    return json.loads((repo / "models" / file).read_text())


def test_repro_writes_a_model_that_transformers_opens(repo):
    from transformers import AutoTokenizer, GPT2LMHeadModel

    model = GPT2LMHeadModel.from_pretrained(repo / "models/gpt2")
    tokenizer = AutoTokenizer.from_pretrained(repo / "models/gpt2")
    prompt = tokenizer("The sea", return_tensors="pt")
    out = model.generate(**prompt, max_new_tokens=3, do_sample=False, pad_token_id=50256)
    assert tokenizer.decode(out[0]).startswith("The sea")


def test_validation_loss_is_that_of_transformers(repo):
    import numpy as np
    from transformers import GPT2LMHeadModel

    model = GPT2LMHeadModel.from_pretrained(repo / "models/gpt2")
    val = np.fromfile(repo / "data/prepared/val.bin", "<u2").astype(np.int64)
    total = 0.0
    with torch.no_grad():
        for start in range(0, len(val) - 1, 16):
            window = torch.from_numpy(val[start : start + 17])[None]
            logits = model(window[:, :-1]).logits[0]
            total += float(
                torch.nn.functional.cross_entropy(logits, window[0, 1:], reduction="sum")
            )
    assert total / (len(val) - 1) == pytest.approx(
        written(repo, "evaluation/metrics.json")["val_loss"], abs=1e-5
    )
    assert written(repo, "training/metrics.json")["best_val_loss"] == pytest.approx(
        written(repo, "evaluation/metrics.json")["val_loss"], abs=1e-5
    )


def test_metrics_files_have_every_figure(repo):
    figures = written(repo, "evaluation/metrics.json")
    assert {
        "val_loss",
        "val_loss_per_character",
        "val_bits_per_byte",
        "val_perplexity",
        "train_loss",
    } <= figures.keys()
    diagnostics = json.loads((repo / "data/diagnostics.json").read_text())
    assert list(diagnostics) == [
        "characters",
        "tokens",
        "unique_tokens",
        "vocabulary",
        "characters_per_token",
        "train_tokens",
        "val_tokens",
        "batches_per_epoch",
        "unseen_val_share",
    ]
    for plot in ("loss", "loss_by_position", "loss_by_rarity"):
        assert (repo / f"models/evaluation/{plot}.png").read_bytes().startswith(b"\x89PNG")


def test_mlflow_has_the_complete_run(repo, store):
    variants, nested = runs_of(store, written(repo, "training/run.json")["train_key"])
    [variant] = variants
    assert variant.data.tags["folio_id"] == written(repo, "training/run.json")["folio_id"]
    assert variant.info.status == "FINISHED"
    assert variant.data.params["train.steps"] == "6"
    assert variant.data.params["data.corpus"] == "data/raw/verses.txt"
    assert int(variant.data.params["data.tokens"]) > 1000
    assert int(variant.data.params["parameters.total"]) > 1000
    assert variant.data.tags["precision"] == "fp32"
    assert variant.data.metrics["evaluate/val_loss"] == pytest.approx(
        written(repo, "evaluation/metrics.json")["val_loss"]
    )
    [dataset] = variant.inputs.dataset_inputs
    assert variant.data.tags["data_digest"].startswith(dataset.dataset.digest)
    folders = {item.path for item in store.list_artifacts(variant.info.run_id)}
    assert folders == {"data", "training"}
    training = {item.path for item in store.list_artifacts(variant.info.run_id, "training")}
    assert {"training/loss.png", "training/history.jsonl"} <= training
    [model] = store.search_logged_models([variant.info.experiment_id])
    weights = files.sha256(repo / "models/gpt2/model.safetensors")
    assert (model.source_run_id, model.status) == (variant.info.run_id, "READY")
    assert model.tags["weights_sha256"] == weights
    [child] = nested
    folders = {item.path for item in store.list_artifacts(child.info.run_id)}
    assert folders == {"evaluation"}
    assert child.data.tags["mlflow.parentRunId"] == variant.info.run_id
    assert child.data.params["evaluate.sample_tokens"] == "4"


def test_mlflow_has_each_row_of_the_history_once(repo, store):
    [[variant], _] = runs_of(store, written(repo, "training/run.json")["train_key"])
    run_id = variant.info.run_id
    history = (repo / "models/training/history.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in history]
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5, 6]
    points = store.get_metric_history(run_id, "train_loss")
    assert [(p.step, p.value, p.timestamp) for p in sorted(points, key=lambda p: p.step)] == [
        (row["step"], row["train_loss"], row["time"]) for row in rows
    ]
    evaluated = [p.step for p in store.get_metric_history(run_id, "val_loss")]
    assert Counter(evaluated) == Counter([2, 4, 6])


def test_dvc_plots_both_losses(repo):
    shown = json.loads(run(repo, "dvc", "plots", "show", "--json").stdout)
    [drawn] = shown["data"]["loss"]
    values = drawn["content"]["data"]["values"]
    steps = {field: [] for field in ("train_loss", "val_loss")}
    for value in values:
        assert float(value["dvc_inferred_y_value"]) > 1
        steps[value["filename::field"].split("::")[1]].append(int(value["step"]))
    assert steps == {"train_loss": [1, 2, 3, 4, 5, 6], "val_loss": [2, 4, 6]}


def test_exp_show_of_a_grid_fits_into_a_terminal(repo):
    """With the commands in docs/sweeps.md; DVC splits the comma lists."""
    page = (ROOT / "docs/sweeps.md").read_text()
    [show] = re.findall(r"^(dvc exp show --only-changed --drop .+?)  +#", page, re.MULTILINE)
    grid = ["-S", "train.learning_rate=1e-3,3e-3", "-S", "train.seed=1,2"]
    assert run(repo, "dvc", "exp", "run", "--queue", *grid).returncode == 0
    table = run(repo, "sh", "-c", show).stdout.strip().splitlines()
    run(repo, "dvc", "queue", "remove", "--all")
    assert table[1].split() == [
        "Experiment", "Created", "best_val_loss", "train.learning_rate", "train.seed",
    ]  # fmt: skip
    assert {tuple(line.split()[-2:]) for line in table if "[" in line} == {
        ("0.001", "1"), ("0.001", "2"), ("0.003", "1"), ("0.003", "2"),
    }  # fmt: skip
    assert max(map(len, table)) <= 120
    loss = written(repo, "training/metrics.json")["best_val_loss"]
    assert f"{loss:.5}" in "\n".join(table)


def test_metrics_of_dvc_are_those_of_the_model(repo):
    shown = json.loads(run(repo, "dvc", "metrics", "show", "--json").stdout)
    assert set(shown[""]["data"]) == {
        "models/training/metrics.json",
        "models/evaluation/metrics.json",
    }


def test_dvc_gets_the_model_as_an_artifact(repo, tmp_path):
    tag = ["git", "tag", "--annotate", "gpt2@v1.0.0", "--message", "first"]
    assert run(repo, *tag).returncode == 0
    got = run(tmp_path, "dvc", "artifacts", "get", str(repo), "gpt2", "--out", "model")
    assert got.returncode == 0, got.stderr
    weights = (tmp_path / "model/model.safetensors").read_bytes()
    assert weights == (repo / "models/gpt2/model.safetensors").read_bytes()


def test_repro_twice_does_nothing(repo):
    before = (repo / "dvc.lock").read_bytes()
    done = run(repo, "dvc", "repro")
    assert "Running stage" not in done.stdout
    assert (repo / "dvc.lock").read_bytes() == before


def test_runtime_params_rerun_nothing_and_evaluate_params_rerun_evaluate(repo):
    set_params(repo, {"runtime.log_interval": 5, "runtime.progress": False})
    assert "Running stage" not in run(repo, "dvc", "repro").stdout
    set_params(repo, {"evaluate.sample_tokens": 5})
    done = run(repo, "dvc", "repro")
    ran = [line for line in done.stdout.splitlines() if line.startswith("Running stage")]
    assert ran == ["Running stage 'check':", "Running stage 'evaluate':"]
    run(repo, "git", "checkout", "params.yaml", "dvc.lock")
    run(repo, "dvc", "checkout")


COMMENTS = {  # a source file, and the stages that a changed comment in it reruns
    "folio/tracking/ui.py": [],
    "folio/tracking/writer.py": [],
    "folio/cli/compare.py": [],
    "folio/app/html.py": [],
    "folio/sweeps/sweep.py": [],
    "folio/errors.py": [],
    "folio/signals.py": [],
    "folio/plots.py": ["prepare", "evaluate"],
    "folio/corpus/statistics.py": ["prepare"],
    "folio/inference/generation.py": ["evaluate"],
    "folio/gpt/model.py": ["check_pretrained", "train", "evaluate"],
    "folio/tokens/batches.py": ["check_pretrained", "prepare", "train", "evaluate"],
    "folio/training/step.py": ["check_pretrained", "train"],
    "folio/device.py": ["check_pretrained", "train", "evaluate"],
}


def test_changed_comment_reruns_only_the_stages_that_use_the_file(repo):
    assert not (set(COMMENTS) - {name for name in COMMENTS if (repo / name).exists()})
    for name, expected in COMMENTS.items():
        original = (repo / name).read_text()
        (repo / name).write_text(original + "\n# another comment\n")
        status = json.loads(run(repo, "dvc", "status", "--json").stdout)
        (repo / name).write_text(original)
        assert sorted(status) == sorted(expected), name


def test_edited_text_reruns_prepare(repo):
    text = repo / "data/raw/verses.txt"
    original = text.read_text()
    text.write_text(original.replace("star", "moon"))
    status = run(repo, "dvc", "status").stdout
    assert "data/raw" in status
    text.write_text(original)


def trainers(repo: Path) -> list[psutil.Process]:
    found = psutil.process_iter(["cmdline", "cwd"])
    words = ["-m", "stages.train"]
    return [
        p for p in found if (p.info["cmdline"] or [])[-2:] == words and p.info["cwd"] == str(repo)
    ]


def test_killed_dvc_leaves_no_trainer_and_the_next_one_resumes(repo, store):
    set_params(repo, {"train.seed": 3, "train.steps": 3000, "train.eval_interval": 100})

    def importing() -> list[psutil.Process]:
        return [p for p in trainers(repo) if any("torch" in map.path for map in p.memory_maps())]

    def checkpoints() -> list[Path]:
        return list(repo.glob(".checkpoints/*/step-*[0-9]"))

    for moment in (importing, checkpoints):  # while it imports PyTorch, and while it trains
        dvc = subprocess.Popen(["dvc", "repro"], cwd=repo, env=environment())
        while not moment():
            assert dvc.poll() is None
            time.sleep(0.02)
        [trainer] = trainers(repo)
        dvc.kill()
        dvc.wait()
        trainer.wait(60)
        assert not [place for place in checkpoints() if "3000" in place.name]  # the last step
    again = run(repo, "dvc", "repro")
    assert again.returncode == 0 and "resuming from the checkpoint of step" in again.stdout
    [variant], _ = runs_of(store, written(repo, "training/run.json")["train_key"])
    assert variant.info.status == "FINISHED"
    assert not list(repo.glob(".checkpoints/*/*"))
    run(repo, "git", "checkout", ".")
    run(repo, "dvc", "checkout")


def test_two_repros_at_once_make_one_run(repo, store):
    set_params(repo, {"train.seed": 4})
    with ThreadPoolExecutor() as pool:
        done = list(pool.map(lambda _: run(repo, "dvc", "repro"), range(2)))
    assert 0 in [d.returncode for d in done]
    for refused in (d for d in done if d.returncode):
        assert "another" in refused.stderr.lower() or "busy" in refused.stderr, refused.stderr
    assert "Running stage" not in run(repo, "dvc", "repro").stdout
    [variant], [_] = runs_of(store, written(repo, "training/run.json")["train_key"])
    assert variant.info.status == "FINISHED"
    run(repo, "git", "checkout", ".")
    run(repo, "dvc", "checkout")
