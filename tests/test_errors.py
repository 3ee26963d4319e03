"""Errors as the user sees them."""

import errno

import pytest

from folio.errors import UserError, one_line_errors


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (UserError("data/x is missing: add it"), "data/x is missing: add it"),
        (
            OSError(errno.ENOSPC, "No space left on device", "data/x"),
            "No space left on device while writing data/x: free some space, then run the same"
            " command again",
        ),
        (
            OSError(errno.EACCES, "Permission denied"),
            "Permission denied: make it writable, then run the same command again",
        ),
    ],
)
def test_one_line_errors_prints_one_line_and_exits_with_status_1(capsys, error, line):
    with pytest.raises(SystemExit) as exit_info, one_line_errors():
        raise error
    assert exit_info.value.code == 1
    assert capsys.readouterr().err == f"folio: {line}\n"


def test_one_line_errors_names_the_stage_that_dvc_runs(capsys, monkeypatch):
    monkeypatch.setenv("DVC_STAGE", "train")
    with pytest.raises(SystemExit), one_line_errors():
        raise UserError("no")
    assert capsys.readouterr().err == "folio train: no\n"


@pytest.mark.parametrize("error", [ValueError("a bug"), OSError(errno.ENOENT, "a bug")])
def test_one_line_errors_lets_bugs_through(error):
    with pytest.raises(type(error), match="a bug"), one_line_errors():
        raise error
