"""`python -m folio serve`: serve a registered model with MLflow's scoring server."""

import os
import sys
from typing import Annotated

import typer

from folio import loopback
from folio.cli.store import open_store


def serve(
    model: Annotated[
        str, typer.Option(help="models:/NAME@ALIAS or models:/NAME/VERSION.")
    ] = "models:/folio@champion",
    port: Annotated[int, typer.Option(min=1, max=65535, help="The port to listen on.")] = 5001,
    allow_host: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME", help="Also answer requests for this host name, such as a proxy's."
        ),
    ] = None,
) -> None:
    """Serve a registered model on 127.0.0.1.

    It can only be reached from this machine.

    Example: python -m folio serve
    """
    from folio.tracking import registry

    hosts = loopback.parse_hosts(allow_host or [])
    store = open_store()
    registry.registered_model_id(store, model)  # raises UserError if there is no such model
    registry.verify(store, model)  # and if its files are missing or damaged
    loopback.check_port(port)
    os.environ["MLFLOW_TRACKING_URI"] = store.uri
    command = [sys.executable, "-m", "folio.tracking.scoring", "--model", model]
    command += ["--port", str(port), *(f"--allow-host={name}" for name in hosts)]
    sys.stdout.flush()
    os.execv(sys.executable, command)
