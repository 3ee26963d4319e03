"""The tags that record where a run comes from: user, git commit, DVC experiment."""

import os
import sys

from mlflow.tracking.context import registry as contexts
from mlflow.utils.mlflow_tags import MLFLOW_GIT_COMMIT

from folio import commands
from folio.errors import UserError


def tags(source: str) -> dict[str, str]:
    """The user, git commit, source file, DVC experiment and its base commit.

    Prints a warning if git fails. The commit is omitted if there is no repository or commit.
    """
    names = {"dvc_experiment": "DVC_EXP_NAME", "dvc_baseline": "DVC_EXP_BASELINE_REV"}
    dvc = {tag: os.environ[name] for tag, name in names.items() if os.environ.get(name)}
    found = contexts.resolve_tags()
    if MLFLOW_GIT_COMMIT not in found:
        try:
            found[MLFLOW_GIT_COMMIT] = commands.head()
        except commands.NoCommitError:
            pass
        except UserError as problem:
            print(f"MLflow will not have this run's git commit: {problem}", file=sys.stderr)
    return found | {"mlflow.source.name": source} | dvc
