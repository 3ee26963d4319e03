"""A registered model behind MLflow's scoring server."""

import os
import shutil
import socket
import sys

from folio.errors import UserError
from folio.tracking import registry
from folio.tracking.store import Store


def serve(address: str | None, model: str, port: int) -> None:
    """Become the server. Raises UserError where there is no such model, or the port is taken."""
    store = Store.existing(address)
    registry.registered_model_id(store, model)
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError as problem:
            reason = os.strerror(problem.errno)
            raise UserError(f"port {port}: {reason}; take another with --port") from None
    mlflow = shutil.which("mlflow")
    if not mlflow:
        raise UserError("mlflow is not on the PATH: `make serve` has it, or activate .venv")
    os.environ["MLFLOW_TRACKING_URI"] = store.uri
    where = ["--host", "127.0.0.1", "--port", str(port), "--env-manager", "local"]
    sys.stdout.flush()
    os.execv(mlflow, [mlflow, "models", "serve", "--model-uri", model, *where])
