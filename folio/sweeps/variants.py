"""Named variants: a small YAML each in variants/, laid over params.yaml as a DVC experiment.

python -m folio variant seed-30m             train it now
python -m folio variant seed-30m --queue     put it on DVC's queue
"""

import os
import sys
from pathlib import Path
from typing import Any

from folio import params
from folio.errors import UserError
from folio.sweeps import queue

FOLDER = Path("variants")


def read(name: str) -> dict[str, Any]:
    """A variant's settings as {"train.steps": 1650, ...}.

    Raises UserError if there is none of that name, or if it is no overlay of params.yaml.
    """
    names = sorted(file.stem for file in FOLDER.glob("*.yaml"))
    if name not in names:
        raise UserError(f"no variant {name!r} in {FOLDER}; there are {', '.join(names)}")
    file = FOLDER / f"{name}.yaml"
    tree = params.read(file)
    for section, values in tree.items():
        if section not in params.SECTIONS or not isinstance(values, dict):
            raise UserError(f"{file}: its top level takes {', '.join(params.SECTIONS)} alone")
    return {
        f"{section}.{key}": value
        for section, values in tree.items()
        for key, value in values.items()
    }


def train(name: str, queued: bool = False) -> None:
    """Become the `dvc` that trains a variant, or queues it. Raises UserError as read does."""
    command = ["dvc", "exp", "run", *(["--queue"] if queued else [])]
    command += queue.overrides(read(name))
    queue.needs_dvc()
    sys.stdout.flush()
    os.execvp("dvc", command)
