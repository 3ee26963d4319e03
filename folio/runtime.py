"""The `runtime` section of params.yaml: where and how a stage runs.

It does not affect results, so no stage in dvc.yaml depends on it.
"""

import re
from dataclasses import dataclass
from typing import Annotated, Literal
from urllib.parse import unquote


@dataclass(frozen=True, kw_only=True)
class RuntimeParams:
    device: Literal["auto", "cuda", "mps", "cpu"]  # auto: the first of the others that is available
    processes: Annotated[Literal["auto"] | int, ">= 1"]  # of train; auto: 1 per GPU, 1 on a CPU
    tracking_uri: str | None  # MLflow's store; null: MLFLOW_TRACKING_URI, or mlflow.db here. A
    # relative path (sqlite:///my.db) starts at the project's root; sqlite:////tmp/my.db is absolute
    log_interval: Annotated[int, ">= 1"]  # steps between rows of the history
    checkpoint_seconds: Annotated[float, ">= 0"]  # between checkpoints; evaluations also save one
    system_metrics: bool  # log CPU, memory, disk, network and GPU usage to MLflow
    progress: bool  # show a progress bar in a terminal

    @property
    def hide_progress(self) -> bool | None:
        """Whether to hide progress bars. None: unless stderr is a terminal."""
        return None if self.progress else True

    def __post_init__(self) -> None:
        if self.tracking_uri is not None and _leaves_project(self.tracking_uri):
            raise ValueError(
                "tracking_uri: `..` points outside the project: use an absolute path, such as "
                "sqlite:////tmp/my.db"
            )


def _leaves_project(uri: str) -> bool:
    """Whether a store's URI is a relative path that contains `..`. False for a server's URI."""
    scheme, colon, path = uri.partition(":")
    if not colon or not re.fullmatch(r"[a-zA-Z][a-zA-Z0-9+.-]*", scheme):
        scheme, path = "", uri
    kind = scheme.lower().partition("+")[0]  # sqlite+pysqlite is SQLite
    if kind in ("sqlite", "file"):
        path = path.removeprefix("//")
        path = path.removeprefix("/") if kind == "sqlite" else path
    elif kind and path.startswith("//"):
        return False
    return not path.startswith("/") and ".." in re.split(r"[/\\:?]", unquote(path))
