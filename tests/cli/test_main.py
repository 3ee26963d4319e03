"""The list of commands, and how errors leave the command line."""

import errno
import subprocess
import sys

import pytest
from mlflow.exceptions import MlflowException
from typer.testing import CliRunner

from folio.cli import main
from folio.errors import UserError

COMMANDS = sorted(command.callback.__name__ for command in main.app.registered_commands)


def test_command_list_imports_neither_pytorch_nor_mlflow():
    code = "import sys, folio.__main__; sys.exit(bool({'torch', 'mlflow'} & sys.modules.keys()))"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_command_list_has_all_commands_with_uncut_summaries():
    output = CliRunner().invoke(main.app, ["--help"]).output
    names = {"compare", "doctor", "export", "promote", "sample", "serve", "sweep", "sync", "ui"}
    names |= {"disk", "gc", "remove", "trial", "variant"}
    assert set(COMMANDS) == names
    assert all(f"\n  {command} " in output for command in COMMANDS)
    assert "..." not in output.partition("Commands:")[2]


@pytest.mark.parametrize("command", COMMANDS)
def test_help_of_a_command_has_an_example(command):
    output = CliRunner().invoke(main.app, [command, "--help"]).output
    assert f"Example: python -m folio {command}" in output


def test_mlflow_errors_become_one_line():
    import folio.tracking.store  # noqa: F401  # a command that uses MLflow has imported it

    with (
        pytest.raises(UserError, match=r"^MLflow failed: no such run$"),
        main._mlflow_errors_as_user_errors(),
    ):
        raise MlflowException("no such run\ndetails")


@pytest.mark.parametrize("words", [["sample", "caf\udce9"], ["compare", "a", "\udcff"]])
def test_argument_that_is_not_text_is_a_one_line_error(monkeypatch, capsys, words):
    monkeypatch.setattr(sys, "argv", ["folio", *words])
    with pytest.raises(SystemExit) as exit_info:
        main.main()
    assert exit_info.value.code == 1
    line = f"folio: the argument {words[-1]!a} is not valid utf-8\n"
    assert capsys.readouterr().err == line


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "disk full"), ZeroDivisionError()])
def test_other_errors_pass_unchanged(error):
    with pytest.raises(type(error)), main._mlflow_errors_as_user_errors():
        raise error


@pytest.mark.parametrize(
    ("words", "line"),
    [
        ("trial rates x", "Invalid value for 'number': it must be a valid integer: `{} trial"),
        ("trial rates", "Missing argument 'number': `{} trial"),
        ("gc --older-than=-1", "'--older-than': it must be greater than or equal to 0: `{} gc"),
        ("gc --nope", "No such option: --nope"),
        ("promote a b", "Got unexpected extra argument(s) (b): `{} promote"),
        ("nope", "No such command 'nope': `{}"),
    ],
)
def test_wrong_arguments_are_a_one_line_error(monkeypatch, capsys, words, line):
    monkeypatch.setattr(sys, "argv", ["folio", *words.split()])
    with pytest.raises(SystemExit) as exit_info:
        main.main()
    assert exit_info.value.code == 1
    error = capsys.readouterr().err
    assert line.format("python -m folio") in error and error.count("\n") == 1
    assert error.startswith("folio: ") and error.endswith(" --help` shows the usage\n")
