"""The tags that record where a run comes from: user, git commit, DVC experiment."""

import os

from mlflow.tracking.context import registry as contexts


def tags(source: str) -> dict[str, str]:
    """The user, git commit, source file, DVC experiment and its base commit."""
    names = {"dvc_experiment": "DVC_EXP_NAME", "dvc_baseline": "DVC_EXP_BASELINE_REV"}
    dvc = {tag: os.environ[name] for tag, name in names.items() if os.environ.get(name)}
    return contexts.resolve_tags() | {"mlflow.source.name": source} | dvc
