"""The tags of a run that say who ran what: user, git commit, DVC experiment."""

import os

from mlflow.tracking.context import registry as contexts


def tags(source: str) -> dict[str, str]:
    """User, git commit, source file, DVC experiment and the commit that it is based on."""
    names = {"dvc_experiment": "DVC_EXP_NAME", "dvc_baseline": "DVC_EXP_BASELINE_REV"}
    dvc = {tag: os.environ[name] for tag, name in names.items() if os.environ.get(name)}
    return contexts.resolve_tags() | {"mlflow.source.name": source} | dvc
