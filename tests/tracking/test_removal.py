"""What must not be removed, and what only another clone of the project may need."""

from pathlib import Path
from types import SimpleNamespace

import pytest

from folio.tracking import removal
from folio.tracking.inventory import Holdings


@pytest.mark.parametrize(
    ("database", "has_files", "has_checkpoint", "elsewhere"),
    [
        (None, False, False, True),
        (None, True, False, False),
        (None, False, True, False),
        (Path("mlflow.db"), False, False, False),  # only this project uses it
    ],
)
def test_run_of_a_shared_server_without_files_here_is_elsewhere(
    database, has_files, has_checkpoint, elsewhere
):
    inventory = SimpleNamespace(
        store=SimpleNamespace(path=database),
        usage=SimpleNamespace(outs={"a": {"md5"}} if has_files else {}),
    )
    found = Holdings(id="a", name="a", checkpoint=Path("x") if has_checkpoint else None)
    assert removal.is_elsewhere(inventory, found) == elsewhere
