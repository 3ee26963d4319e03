"""All that knows MLflow. The settings below have to be there before MLflow is imported."""

import os

os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
# MLflow's own settings retry for minutes when a server is down. One attempt is enough here, since
# whatever is missing is sent later; and a retry after a lost answer would create a run twice.
os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "10")
os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
