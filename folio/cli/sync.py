"""`python -m folio sync`: send MLflow the runs that it does not have."""

import os

from folio.cli.store import tracking_uri


def sync() -> None:
    """Send MLflow every run that it does not have yet.

    Sends the trainings and evaluations whose files are in the workspace or in DVC's cache, then
    interrupted trainings as far as they got. Updates the artifact URIs of a local store whose
    project was moved. A second run changes nothing.

    Example: python -m folio sync
    """
    # A training waits ten seconds for MLflow to answer; this command can wait longer.
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "120")
    from folio.run import project_root
    from folio.tracking.sync import run

    messages = run(tracking_uri(), project_root())
    print("\n".join(messages or ["MLflow has every run"]))
