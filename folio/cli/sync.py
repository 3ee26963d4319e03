"""`python -m folio sync`: send missing runs to MLflow."""

import os

from folio.cli.store import tracking_uri


def sync() -> None:
    """Send every run that is missing from MLflow.

    Sends the training and evaluation runs whose files are in the workspace or in DVC's cache, then
    the last state of interrupted training runs. Updates the artifact URIs of a local store if the
    project was moved. Running it again changes nothing.

    Example: python -m folio sync
    """
    # During training, MLflow has ten seconds to respond; this command can wait longer.
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "120")
    from folio.run import project_root
    from folio.tracking.sync import run

    messages = run(tracking_uri(), project_root())
    print("\n".join(messages or ["MLflow has every run"]))
