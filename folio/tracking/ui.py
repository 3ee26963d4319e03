"""The layout of MLflow's UI: the columns of the table of runs, and the charts next to it.

To add a chart, add a line to _CHARTS.

MLflow's UI has a Share button, which stores the current layout as JSON in a tag of the experiment.
A URL with `?viewStateShareKey=NAME` shows that layout. This module writes such a tag. The format is
undocumented; the keys are those used by the UI of MLflow 3.
"""

import json
from typing import Any

KEY = "folio"
TAG = f"mlflow.sharedViewState.{KEY}"

_COLUMNS = (
    "metrics.`best_val_loss`",
    "metrics.`kept_val_loss`",
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
_PARALLEL_PARAMS = ("model.n_layer", "model.n_embd", "train.learning_rate", "train.weight_decay")

# The charts of each section: (kind, title, metrics).
_CHARTS = {
    "Loss": (
        ("LINE", "Validation loss, nats/token", ["val_loss"]),
        ("LINE", "Training loss, nats/token", ["train_loss"]),
        ("BAR", "Best validation loss, nats/token", ["best_val_loss"]),
        ("PARALLEL", "Best validation loss by parameters", ["best_val_loss"]),
    ),
    "Training": (
        ("LINE", "Learning rate", ["learning_rate"]),
        ("LINE", "Gradient norm", ["grad_norm"]),
        ("LINE", "Tokens/s", ["tokens_per_second"]),
    ),
}


def tags() -> dict[str, str]:
    """The experiment's tags: its kind, primary metric, description and layout."""
    return {
        # Without this, MLflow may show its UI for chat applications.
        "mlflow.experimentKind": "custom_model_development",
        "mlflow.experiment.primaryMetric.name": "best_val_loss",
        "mlflow.experiment.primaryMetric.greaterIsBetter": "False",
        "mlflow.note.content": (
            "Each run is one trained variant. Compare best_val_loss (validation loss, nats/token)"
            " only between runs with the same held_out_digest. kept_val_loss is the loss of"
            " the run's model, which is not that of its best evaluation if train.keep is last."
        ),
        TAG: json.dumps(_layout(), separators=(",", ":")),
    }


def _layout() -> dict[str, Any]:
    """The layout, as the Share button would store it."""
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
        "searchFilter": "attributes.run_name != 'evaluate'",  # nested under the training runs
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
    """One chart. kind: LINE (by step), BAR or PARALLEL (parallel coordinates)."""
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
        return chart | {
            "selectedMetrics": metrics,
            "selectedParams": _PARALLEL_PARAMS,
            "showAllRuns": False,
        }
    return chart
