"""`python -m folio serve`: a registered model behind MLflow's scoring server."""

import os
import shutil
import socket
import sys
from typing import Annotated

import typer

from folio.cli.store import open_store
from folio.errors import UserError

_HOST = "127.0.0.1"


def serve(
    model: Annotated[
        str, typer.Option(help="models:/NAME@ALIAS or models:/NAME/VERSION.")
    ] = "models:/folio@champion",
    port: Annotated[int, typer.Option(min=1, max=65535, help="The port to listen on.")] = 5001,
) -> None:
    """Serve a registered model on 127.0.0.1.

    Only programs on this machine can reach it.

    Example: python -m folio serve
    """
    from folio.tracking.registry import registered_model_id

    store = open_store()
    registered_model_id(store, model)  # raises UserError if there is no such model
    _check_port(port)
    mlflow = shutil.which("mlflow")
    if not mlflow:
        raise UserError("mlflow is not on the PATH: use `make serve`, or activate .venv")
    os.environ["MLFLOW_TRACKING_URI"] = store.uri
    address = ["--host", _HOST, "--port", str(port), "--env-manager", "local"]
    sys.stdout.flush()
    os.execv(mlflow, [mlflow, "models", "serve", "--model-uri", model, *address])


def _check_port(port: int) -> None:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((_HOST, port))
        except OSError as error:
            raise UserError(f"port {port}: {error.strerror}; choose another --port") from None
