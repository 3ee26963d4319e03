"""A model whose weights are in several files goes through the pipeline and all commands."""

import json
import shutil
from pathlib import Path

import pytest
import safetensors.torch
import transformers  # imports its models when they are used
from conftest import commit, folio, inside, run, set_params, succeed

from benchmarks.comparison import compare_mlflow, compare_outs
from folio import files
from folio.errors import UserError
from folio.gpt import huggingface, safetensors_files, weight_files
from folio.gpt.validation import token_losses
from folio.run import read_training
from folio.tokens import token_files, tokenizer
from folio.tracking import logged_models, registry
from folio.tracking.store import Store

LIMIT = 3_000_000  # bytes: the embeddings have 3.2 MB


@pytest.fixture(scope="module")
def project(make_project) -> Path:
    """A committed project after `dvc repro`, with LIMIT instead of 5 GB."""
    folder = make_project()
    source = folder / "folio/gpt/safetensors_files.py"
    text = source.read_text()
    assert text.count("MAX_SHARD = 5 * 10**9") == 1
    source.write_text(text.replace("MAX_SHARD = 5 * 10**9", f"MAX_SHARD = {LIMIT}"))
    commit(folder)
    succeed(folder, "dvc", "repro")
    commit(folder, "first run")
    return folder


def shards(folder: Path) -> list[Path]:
    return sorted(folder.glob("model-*.safetensors"))


def test_repro_writes_shards_that_transformers_opens(project):
    folder = project / "models/gpt2"
    assert [path.name for path in shards(folder)] == [
        "model-00001-of-00002.safetensors",
        "model-00002-of-00002.safetensors",
    ]
    assert not (folder / "model.safetensors").exists()
    other = transformers.GPT2LMHeadModel.from_pretrained(folder)
    ids = transformers.AutoTokenizer.from_pretrained(folder)("The sea", return_tensors="pt")
    assert other(**ids).logits.shape == (1, 2, tokenizer.VOCAB_SIZE)
    tags = read_training(project).record.tags
    assert tags["weights_sha256"] == weight_files.sha256(folder)
    assert json.loads((project / "models/evaluation/metrics.json").read_text())["val_loss"] > 0
    assert "up to date" in succeed(project, "dvc", "repro")


def test_export_has_the_shards_and_the_command_that_checks_them(project, monkeypatch, tmp_path):
    monkeypatch.setattr(safetensors_files, "MAX_SHARD", LIMIT)
    folio(project, "export", str(tmp_path / "shared"))
    names = [path.name for path in shards(project / "models/gpt2")] + [weight_files.INDEX]
    for name in names:
        assert files.sha256(tmp_path / "shared" / name) == files.sha256(
            project / "models/gpt2" / name
        )
    [line] = [
        line
        for line in (tmp_path / "shared/README.md").read_text().splitlines()
        if line.startswith("- SHA-256 of the output of")
    ]
    command, digest = line.split("`")[1], line.split()[-1]
    printed = succeed(tmp_path / "shared", "bash", "-c", f"{command} | sha256sum")
    assert printed.split()[0] == digest == weight_files.sha256(project / "models/gpt2")


def test_promote_sample_and_compare_use_the_shards(project, tmp_path):
    assert "is now the champion" in folio(project, "promote")
    with inside(project):
        fetched = registry.fetch(Store.existing(None), "models:/folio@champion", tmp_path)
        names = {path.name for path in fetched.glob(weight_files.PATTERN)}
        assert names == {path.name for path in Path("models/gpt2").glob(weight_files.PATTERN)}
    assert folio(project, "sample", "The sea", "--model", "models:/folio@champion").strip()
    assert "1x2x16" in folio(project, "compare")


def test_sync_restores_the_shards_in_a_clone_without_a_store(project, tmp_path):
    assert list(compare_mlflow(project, f"sqlite:///{project / 'mlflow.db'}")) == []
    clone = tmp_path / "clone"
    succeed(tmp_path, "git", "clone", "-q", str(project), str(clone))
    shutil.copytree(project / ".dvc/cache", clone / ".dvc/cache")
    succeed(clone, "dvc", "checkout")
    folio(clone, "sync")
    assert list(compare_outs(project, clone)) == []
    assert list(compare_mlflow(clone, f"sqlite:///{clone / 'mlflow.db'}")) == []


def test_damaged_shard_in_mlflow_is_refused_and_sent_again(project):
    with inside(project):
        store = Store.existing(None)
        [model] = logged_models.all_models(store)
        folder = Path(model.artifact_location.removeprefix("file://")) / "artifacts/gpt2"
        shards(folder)[1].write_bytes(bytes(shards(folder)[1].stat().st_size))
        assert not logged_models.is_complete(store, model)
    with pytest.raises(UserError, match="missing or damaged"):
        folio(project, "sample", "The sea", "--model", "models:/folio@champion")
    folio(project, "sync")
    assert folio(project, "sample", "The sea", "--model", "models:/folio@champion").strip()


def test_damaged_shard_in_the_workspace_is_refused_by_evaluate_and_sample(project, tmp_path):
    copy = shutil.copytree(project, tmp_path / "copy")
    path = shards(copy / "models/gpt2")[1]
    tensors = safetensors.torch.load_file(path)
    safetensors.torch.save_file({n: t + 1 for n, t in tensors.items()}, path, {"format": "pt"})
    with pytest.raises(UserError, match="damaged"):
        folio(copy, "sample", "The sea")
    done = run(copy, "python", "-m", "stages.evaluate")
    assert done.returncode == 1 and done.stderr.count("\n") == 1
    assert "models/gpt2 is not the model that models/training describes" in done.stderr
    succeed(copy, "dvc", "checkout", "--force")
    assert huggingface.load(copy / "models/gpt2").params.n_embd == 16


def test_model_that_two_processes_share_is_saved_in_the_same_files(project, tmp_path):
    copy = shutil.copytree(project, tmp_path / "copy")
    shutil.rmtree(copy / "models/gpt2")
    plain = {"train.optimizer": "adamw", "train.factored_embedding": False}
    set_params(copy, plain | {"train.parallel": "fsdp", "runtime.processes": 2})
    succeed(copy, "python", "-m", "stages.train")
    names = [path.name for path in (copy / "models/gpt2").iterdir()]
    assert sorted(names) == sorted(path.name for path in (project / "models/gpt2").iterdir())
    trained, data = read_training(copy), token_files.read(copy / "data/prepared")
    losses = token_losses(huggingface.load(copy / "models/gpt2"), data.val)
    assert losses.mean() == pytest.approx(trained.summary["best_val_loss"], abs=1e-5)
    assert trained.record.tags["weights_sha256"] == weight_files.sha256(copy / "models/gpt2")
