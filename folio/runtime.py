"""Where and how a stage runs, without a say in what comes out: DVC reruns nothing for these."""

from dataclasses import dataclass
from typing import Annotated

from folio.device import Device


@dataclass(frozen=True, kw_only=True)
class RuntimeParams:
    device: Device  # auto: cuda, else mps, else cpu
    tracking_uri: str | None  # MLflow's store; null: mlflow.db here, or MLFLOW_TRACKING_URI
    log_interval: Annotated[int, ">= 1"]  # updates between rows of the history
    checkpoint_seconds: Annotated[float, ">= 0"]  # between checkpoints, besides each evaluation's
    system_metrics: bool  # log the machine's load to MLflow
    progress: bool  # show a bar where there is a terminal
