"""Named variants: small YAML files in variants/ that override params.yaml in a DVC experiment.

python -m folio variant seed-30m             train it now
python -m folio variant seed-30m --queue     put it on DVC's queue
"""

import os
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import yaml

from folio import commands, params, strict_yaml
from folio.errors import UserError
from folio.sweeps import overrides, queue

FOLDER = Path("variants")


def read(name: str) -> dict[str, Any]:
    """A variant's settings as {"train.steps": 1650, ...}.

    Raises UserError if there is no such variant, or if its file does not consist of sections of
    params.yaml.
    """
    names = sorted(file.stem for file in FOLDER.glob("*.yaml"))
    if name not in names:
        raise UserError(
            f"there is no variant {name!r} in {FOLDER}; available: {', '.join(names) or 'none'}"
        )
    file = FOLDER / f"{name}.yaml"
    tree = params.read(file)
    for section, values in tree.items():
        if section not in params.SECTIONS or not isinstance(values, dict):
            raise UserError(
                f"{file}: only sections are allowed at the top level: {', '.join(params.SECTIONS)}"
            )
    return {
        f"{section}.{key}": value
        for section, values in tree.items()
        for key, value in values.items()
    }


def _uncommitted(tree: dict[Any, Any]) -> set[str]:
    """The names of the params whose values in params.yaml are not those of the last commit.

    Empty if the commit has no params.yaml, or none that can be read.
    """
    try:
        committed = strict_yaml.load(commands.git("show", f"HEAD:./{params.FILE}"))
        before, now = ({(s, k): v for s in t for k, v in t[s].items()} for t in (committed, tree))
    except (UserError, ValueError, AttributeError, TypeError, yaml.YAMLError):
        return set()
    changed = {key for key in before.keys() | now.keys() if before.get(key) != now.get(key)}
    return {f"{section}.{key}" for section, key in changed if section != "runtime"}


def report_uncommitted(name: str, settings: Iterable[str]) -> None:
    """Print which params of the variant's runs come from uncommitted changes of params.yaml.

    settings: the names of the params that the runs set themselves.
    """
    if stacked := sorted(_uncommitted(params.read(params.FILE)) - {*settings}):
        print(
            f"{name} is applied to params.yaml as it is now, which differs from the commit in"
            f" {', '.join(stacked)} (`git checkout HEAD -- . && dvc checkout --force` discards"
            " that)",
            file=sys.stderr,
        )


def train(name: str, queued: bool = False) -> None:
    """Replace this process with the `dvc exp run` command that trains a variant or queues it.

    Raises UserError if there is no such variant, its settings are invalid, dvc is not installed, or
    there is no git commit for the experiment to start from.
    """
    settings, current = read(name), params.read(params.FILE)
    overrides.check(current, settings, f"{params.FILE} with variant {name}")
    queue.require_dvc()
    if queued:
        queue.check_folder()
    commands.head()
    report_uncommitted(name, settings)
    command = ["dvc", "exp", "run", *(["--queue"] if queued else [])]
    command += overrides.param_options(settings)
    sys.stdout.flush()
    os.execvp("dvc", command)
