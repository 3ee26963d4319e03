"""Everything that uses MLflow. The settings below must be in place before MLflow is imported."""

import os

from folio import loopback

loopback.bypass_proxies()  # for a server on this machine
os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
# By default, MLflow retries for minutes when a server is down. One attempt is enough here, because
# anything missing is sent later. A retry after a lost response would create a run twice.
os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "10")
os.environ.setdefault("PGCONNECT_TIMEOUT", "10")  # PostgreSQL's client would wait for minutes
os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
# MLflow's client would print a server's URI, which may contain a password.
os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")
