"""The whole pipeline in a real DVC repository of its own, with a real MLflow store."""

import json
import subprocess
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import mlflow
import psutil
import pytest
import torch
from conftest import environment, run, set_params

from folio import files


@pytest.fixture(scope="module")
def repo(make_trained) -> Path:
    """A committed repository in which `dvc repro` has run."""
    return make_trained()


@pytest.fixture
def store(repo: Path) -> mlflow.MlflowClient:
    return mlflow.MlflowClient(f"sqlite:///{repo / 'mlflow.db'}")


def runs_of(store: mlflow.MlflowClient, key: str) -> tuple[list, list]:
    """(variants, their nested evaluations) that carry a train_key."""
    experiment = store.get_experiment_by_name("folio")
    found = store.search_runs([experiment.experiment_id], f"tags.train_key = '{key}'")
    nested = [r for r in found if "mlflow.parentRunId" in r.data.tags]
    return [r for r in found if r not in nested], nested


def written(repo: Path, file: str) -> dict:
    return json.loads((repo / "models" / file).read_text())


def test_repro_leaves_a_model_that_transformers_opens_and_samples_from(repo):
    from transformers import AutoTokenizer, GPT2LMHeadModel

    model = GPT2LMHeadModel.from_pretrained(repo / "models/gpt2")
    tokenizer = AutoTokenizer.from_pretrained(repo / "models/gpt2")
    prompt = tokenizer("The sea", return_tensors="pt")
    out = model.generate(**prompt, max_new_tokens=3, do_sample=False, pad_token_id=50256)
    assert tokenizer.decode(out[0]).startswith("The sea")


def test_transformers_finds_the_same_held_out_loss(repo):
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


def test_every_figure_of_the_issue_is_in_the_metrics_files(repo):
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
    for picture in ("training/loss", "evaluation/loss_by_position", "evaluation/loss_by_rarity"):
        assert (repo / f"models/{picture}.png").read_bytes().startswith(b"\x89PNG")


def test_mlflow_holds_the_run_with_all_that_belongs_to_it(repo, store):
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
    [model] = store.search_logged_models([variant.info.experiment_id])
    weights = files.sha256(repo / "models/gpt2/model.safetensors")
    assert (model.source_run_id, model.status) == (variant.info.run_id, "READY")
    assert model.tags["weights_sha256"] == weights
    [child] = nested
    folders = {item.path for item in store.list_artifacts(child.info.run_id)}
    assert folders == {"evaluation"}
    assert child.data.tags["mlflow.parentRunId"] == variant.info.run_id
    assert child.data.params["evaluate.sample_tokens"] == "4"


def test_mlflow_holds_each_row_of_the_history_once(repo, store):
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


def test_dvc_draws_both_losses_from_every_number_and_from_nothing_else(repo):
    shown = json.loads(run(repo, "dvc", "plots", "show", "--json").stdout)
    [drawn] = shown["data"]["loss"]
    values = drawn["content"]["data"]["values"]
    steps = {field: [] for field in ("train_loss", "val_loss")}
    for value in values:
        assert float(value["dvc_inferred_y_value"]) > 1
        steps[value["filename::field"].split("::")[1]].append(int(value["step"]))
    assert steps == {"train_loss": [1, 2, 3, 4, 5, 6], "val_loss": [2, 4, 6]}


def test_a_second_repro_does_nothing(repo):
    before = (repo / "dvc.lock").read_bytes()
    done = run(repo, "dvc", "repro")
    assert "Running stage" not in done.stdout
    assert (repo / "dvc.lock").read_bytes() == before


def test_runtime_params_rerun_nothing_and_evaluate_params_evaluate_alone(repo):
    set_params(repo, {"runtime.log_interval": 5, "runtime.progress": False})
    assert "Running stage" not in run(repo, "dvc", "repro").stdout
    set_params(repo, {"evaluate.sample_tokens": 5})
    done = run(repo, "dvc", "repro")
    ran = [line for line in done.stdout.splitlines() if line.startswith("Running stage")]
    assert ran == ["Running stage 'evaluate':"]
    run(repo, "git", "checkout", "params.yaml", "dvc.lock")
    run(repo, "dvc", "checkout")


def test_an_edited_text_reruns_prepare_and_what_follows(repo):
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


def test_a_killed_dvc_leaves_no_trainer_and_the_next_one_goes_on_with_its_work(repo, store):
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
    assert again.returncode == 0 and "going on from the checkpoint of step" in again.stdout
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
