"""Four experiments at once, into a store that is not there yet."""

import shutil
import time
from pathlib import Path

import mlflow
from conftest import run, succeed

SEEDS = ("1", "2", "3", "4")


def test_four_queued_experiments_at_once_keep_their_runs(make_trained):
    repo = make_trained()
    (repo / "mlflow.db").unlink()
    shutil.rmtree(repo / "mlruns")
    for seed in SEEDS:
        succeed(repo, "dvc", "exp", "run", "--queue", "-S", f"train.seed={seed}")
    succeed(repo, "dvc", "queue", "start", "-j", "4")
    end = time.monotonic() + 240
    while time.monotonic() < end:
        status = run(repo, "dvc", "queue", "status").stdout
        if "Running" not in status and "Queued" not in status:
            break
        time.sleep(3)
    assert status.count("Success") == 4, status
    store = mlflow.MlflowClient(f"sqlite:///{repo / 'mlflow.db'}")
    experiment = store.get_experiment_by_name("folio").experiment_id
    for seed in SEEDS:
        [variant] = store.search_runs([experiment], f"params.`train.seed` = '{seed}'")
        assert variant.info.status == "FINISHED"
        assert variant.data.tags["dvc_experiment"] and variant.data.tags["dvc_baseline"]
        assert Path(variant.info.artifact_uri.removeprefix("file://")).is_relative_to(repo)
        assert "evaluate/val_loss" in variant.data.metrics
        points = store.get_metric_history(variant.info.run_id, "train_loss")
        assert sorted(point.step for point in points) == [1, 2, 3, 4, 5, 6]
        folders = {item.path for item in store.list_artifacts(variant.info.run_id)}
        assert folders == {"data", "training"}
        models = store.search_logged_models([experiment])
        assert variant.info.run_id in {model.source_run_id for model in models}
