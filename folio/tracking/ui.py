"""How MLflow's page arranges the runs: the columns of its table, and the charts beside it.

The page keeps what its Share button makes as a tag of the experiment, in JSON, and shows it to
whoever comes with `?viewStateShareKey=NAME`. MLflow has no other way to say it, and documents
none: the names are those of MLflow 3's page.
"""

import json
from typing import Any

KEY = "folio"
TAG = f"mlflow.sharedViewState.{KEY}"

_COLUMNS = (
    "metrics.`best_val_loss`",
    "metrics.`last_train_loss`",
    "metrics.`best_step`",
    "metrics.`median_tokens_per_second`",
    "params.`data.corpus`",
    "params.`model.n_layer`",
    "params.`model.n_embd`",
    "params.`model.block_size`",
    "params.`train.learning_rate`",
    "params.`train.weight_decay`",
    "params.`train.steps`",
    "tags.`dvc_experiment`",
)
_LEVERS = ("model.n_layer", "model.n_embd", "train.learning_rate", "train.weight_decay")

# Sections, and their charts: (kind, title, metrics).
_CHARTS = {
    "Loss": (
        ("LINE", "Held-out loss, nats a token", ["val_loss"]),
        ("LINE", "Training loss, nats a token", ["train_loss"]),
        ("BAR", "Best held-out loss", ["best_val_loss"]),
        ("PARALLEL", "What the held-out loss depends on", ["best_val_loss"]),
    ),
    "Training": (
        ("LINE", "Learning rate", ["learning_rate"]),
        ("LINE", "Norm of the gradient", ["grad_norm"]),
        ("LINE", "Tokens a second", ["tokens_per_second"]),
    ),
}


def tags() -> dict[str, str]:
    """The experiment's tags: what it is, what counts, and the arrangement."""
    return {
        "mlflow.experimentKind": "custom_model_development",  # else the page is one for chats
        "mlflow.experiment.primaryMetric.name": "best_val_loss",
        "mlflow.experiment.primaryMetric.greaterIsBetter": "False",
        "mlflow.note.content": (
            "One run a trained variant. best_val_loss, nats a token of held-out text, is what"
            " counts; losses compare where held_out_digest is the same."
        ),
        TAG: json.dumps(_state(), separators=(",", ":")),
    }


def _state() -> dict[str, Any]:
    charts = [
        _chart(kind, f"{section}{number}", section, title, metrics)
        for section, rows in _CHARTS.items()
        for number, (kind, title, metrics) in enumerate(rows)
    ]
    sections = [
        {"uuid": name, "name": name, "display": True, "isReordered": True, "deleted": False}
        | {"columns": 2, "cardHeight": 320}
        for name in _CHARTS
    ]
    return {
        "searchFilter": "attributes.run_name != 'evaluate'",  # nested in the trainings' runs
        "orderByKey": "metrics.`best_val_loss`",
        "orderByAsc": True,
        "selectedColumns": _COLUMNS,
        "runsHiddenMode": "FIRST_10_RUNS",
        "compareRunCharts": charts,
        "compareRunSections": sections,
        "isAccordionReordered": True,
        "autoRefreshEnabled": True,
    }


def _chart(kind: str, uuid: str, section: str, title: str, metrics: list[str]) -> dict[str, Any]:
    chart = {
        "type": kind,
        "uuid": uuid,
        "metricSectionId": section,
        "runsCountToCompare": 10,
        "deleted": False,
        "isGenerated": False,
        "displayName": title,
        "metricKey": metrics[0],
    }
    if kind == "LINE":
        return chart | {
            "selectedMetricKeys": metrics,
            "lineSmoothness": 0,
            "xAxisKey": "step",
            "xAxisScaleType": "linear",
            "scaleType": "linear",
            "range": {},
            "yAxisKey": "metric",
        }
    if kind == "PARALLEL":
        return chart | {"selectedMetrics": metrics, "selectedParams": _LEVERS, "showAllRuns": False}
    return chart
