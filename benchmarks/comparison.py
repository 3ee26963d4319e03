"""Compares two projects' results, and a project with its runs in MLflow."""

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

os.environ["MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR"] = "false"
os.environ["MLFLOW_DISABLE_TELEMETRY"] = "true"

import mlflow
import torch
from mlflow.entities import Run, ViewType
from safetensors.torch import load_file

from benchmarks.project import read_history
from folio.gpt import weight_files
from folio.run import RECORD
from folio.tracking import logged_models


def compare_outs(expected: Path, folder: Path) -> Iterator[str]:
    """Yield how weights, history and files of a project differ from the expected ones."""
    models = [project / "models/gpt2" for project in (expected, folder)]
    if len(set(map(weight_files.sha256, models))) > 1:
        one, other = map(read_weights, models)
        largest = max(float((one[name] - other[name]).abs().max()) for name in one)
        yield f"weights differ by up to {largest:.2e}"
    columns = ("step", "train_loss", "learning_rate", "grad_norm", "val_loss")
    rows, others = (
        [tuple(map(r.get, columns)) for r in read_history(p)] for p in (expected, folder)
    )
    if rows != others:
        different = sum(a != b for a, b in zip(rows, others, strict=False))
        yield f"history has {len(others)} rows, not {len(rows)}; {different} of them differ"
    names, found = (
        {
            str(f.relative_to(p))
            for pattern in ("models/**/*", ".checkpoints/*/*")
            for f in p.glob(pattern)
        }
        for p in (expected, folder)
    )
    if names != found:
        yield f"leftover or missing files: {sorted(names ^ found)}"


def read_weights(model: Path) -> dict[str, torch.Tensor]:
    """All tensors in a Hugging Face folder, by name."""
    files = model.glob("*.safetensors")
    return {name: tensor for file in files for name, tensor in load_file(file).items()}


def compare_mlflow(folder: Path, uri: str) -> Iterator[str]:
    """Yield how a store differs from a project: it must contain one training run and, nested under
    it, one evaluation run, with every point exactly once and with the project's files."""
    client = mlflow.MlflowClient(uri)
    runs = list_runs(client)
    nested = [run for run in runs if "mlflow.parentRunId" in run.data.tags]
    trained = [run for run in runs if run not in nested]
    for kind, found in (("training", trained), ("evaluation", nested)):
        statuses = [run.info.status for run in found]
        if statuses != ["FINISHED"]:
            yield f"instead of one finished {kind} run, MLflow has {statuses}"
    rows = read_history(folder)
    expected = {(k, r["step"], v) for r in rows for k, v in r.items() if k not in ("step", "time")}
    for run in runs:
        points = [
            (key, point.step, point.value)
            for key in run.data.metrics
            for point in client.get_metric_history(run.info.run_id, key)
        ]
        repeated = len(points) - len({point[:2] for point in points})
        missing = len(expected - set(points)) if run in trained else 0
        if repeated or missing:
            yield f"in MLflow, {repeated} points are repeated and {missing} are missing"
    for found, files in ((trained, training_files(folder)), (nested, evaluation_files(folder))):
        for run in found:
            with tempfile.TemporaryDirectory() as copy:
                client.download_artifacts(run.info.run_id, "", copy)
                sent = dict(files_in(Path(copy)))
            names = sorted(n for n in files.keys() | sent.keys() if files.get(n) != sent.get(n))
            if names:
                yield f"MLflow's artifacts differ: {names}"
    for run in trained:
        if logged_model(client, run) != dict(files_in(folder / "models/gpt2")):
            yield "MLflow's model differs"


def training_files(folder: Path) -> dict[str, bytes]:
    """The artifacts that a project's training run must have."""
    return {
        **{f"training/{name}": content for name, content in files_in(folder / "models/training")},
        **{f"data/{name}": content for name, content in files_in(folder / "data/diagnostics")},
        "data/diagnostics.json": (folder / "data/diagnostics.json").read_bytes(),
        "training/loss.png": (folder / "models/evaluation/loss.png").read_bytes(),
    }


def evaluation_files(folder: Path) -> dict[str, bytes]:
    """The artifacts that a project's evaluation run must have."""
    found = files_in(folder / "models/evaluation")
    return {f"evaluation/{name}": content for name, content in found}


def logged_model(client: mlflow.MlflowClient, run: Run) -> dict[str, bytes]:
    """The files of the model that a run has logged; {} if there is none or more than one."""
    query = f"source_run_id = '{run.info.run_id}'"
    models = client.search_logged_models([run.info.experiment_id], query)
    if [model.status for model in models] != ["READY"]:
        return {}
    uri = f"{models[0].artifact_location}/artifacts/{logged_models.ARTIFACT}"
    with tempfile.TemporaryDirectory() as copy:
        destination = {"dst_path": copy, "tracking_uri": client.tracking_uri}
        return dict(files_in(Path(mlflow.artifacts.download_artifacts(uri, **destination))))


def files_in(folder: Path) -> Iterator[tuple[str, bytes]]:
    """The names and contents of the files in a folder, except for the record, which MLflow stores
    as params and tags."""
    for file in filter(Path.is_file, folder.rglob("*")):
        if file.name != RECORD:
            yield str(file.relative_to(folder)), file.read_bytes()


def list_runs(client: mlflow.MlflowClient) -> list[Run]:
    experiment = client.get_experiment_by_name("folio")
    assert experiment, "there is no experiment in the store"
    return client.search_runs([experiment.experiment_id], run_view_type=ViewType.ALL)
