"""Where and how a stage runs, without a say in what comes out: DVC reruns nothing for these."""

import re
from dataclasses import dataclass
from typing import Annotated, Literal
from urllib.parse import unquote

_ADDRESS = re.compile(r"(?:([a-zA-Z][a-zA-Z0-9+.-]*):)?(.*)", re.DOTALL)  # a scheme, the rest


@dataclass(frozen=True, kw_only=True)
class RuntimeParams:
    device: Literal["auto", "cuda", "mps", "cpu"]  # auto: cuda, else mps, else cpu
    tracking_uri: str | None  # MLflow's store; null: mlflow.db here, or MLFLOW_TRACKING_URI.
    # A relative path, as in sqlite:///my.db, is the project's; sqlite:////tmp/my.db is absolute.
    log_interval: Annotated[int, ">= 1"]  # updates between rows of the history
    checkpoint_seconds: Annotated[float, ">= 0"]  # between checkpoints, besides each evaluation's
    system_metrics: bool  # log the machine's load to MLflow
    progress: bool  # show a bar where there is a terminal

    def __post_init__(self):
        if self.tracking_uri is not None and _leads_out(self.tracking_uri):
            raise ValueError(
                "tracking_uri: a `..` in it leads out of the project: give an absolute path, "
                "sqlite:////like/this.db"
            )


def _leads_out(uri: str) -> bool:
    """Whether a store's address is a relative path with `..` in it; a server's has no such path."""
    scheme, place = _ADDRESS.fullmatch(uri).groups(default="")
    kind = scheme.lower().partition("+")[0]  # sqlite+pysqlite is SQLite
    if kind in ("sqlite", "file"):
        place = place.removeprefix("//")
        place = place.removeprefix("/") if kind == "sqlite" else place
    elif kind and place.startswith("//"):
        return False
    return not place.startswith("/") and ".." in re.split(r"[/\\:?]", unquote(place))
