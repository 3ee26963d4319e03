"""The entry point of `python -m folio`: registers the commands and reports their errors."""

import contextlib
import re
import sys
from collections.abc import Iterator
from typing import Any

import typer

from folio.cli import (
    compare,
    disk,
    doctor,
    export,
    gc,
    promote,
    remove,
    sample,
    serve,
    sweep,
    sync,
    trial,
    ui,
    variant,
)
from folio.errors import UserError, one_line_errors

_USAGE_ERROR: Any = typer.BadParameter.__base__  # of all errors in the arguments
_SURROGATE = re.compile("[\ud800-\udfff]")  # a byte that could not be decoded

app = typer.Typer(
    name="python -m folio",
    help="Folio trains, compares and serves GPT-2 language models. Run it in the root folder of the"
    " project.",
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command()(sample.sample)
app.command()(compare.compare)
app.command()(promote.promote)
app.command()(ui.ui)
app.command()(serve.serve)
app.command()(export.export)
app.command()(doctor.doctor)
app.command()(sync.sync)
app.command()(disk.disk)
app.command()(remove.remove)
app.command()(gc.gc)
app.command()(variant.variant)
app.command()(sweep.sweep)
app.command()(trial.trial)


def main() -> None:
    with one_line_errors(), _mlflow_errors_as_user_errors():
        for word in sys.argv[1:]:
            if _SURROGATE.search(word):
                raise UserError(f"the argument {word!a} is not valid {sys.getfilesystemencoding()}")
        try:
            words = sys.argv[1:] or ["--help"]
            status = app(words, prog_name=app.info.name, standalone_mode=False)
        except _USAGE_ERROR as error:
            raise UserError(_describe(error)) from None
    sys.exit(status)


def _describe(error: Any) -> str:
    """Typer's usage error in one line, with the command that prints the right usage."""
    problem = error.format_message().partition(", unable to parse")[0].rstrip(".")
    command = error.ctx.command_path if error.ctx else app.info.name
    return f"{problem.replace('Input should be', 'it must be')}: `{command} --help` shows the usage"


@contextlib.contextmanager
def _mlflow_errors_as_user_errors() -> Iterator[None]:
    """Raise UserError for MLflow's errors: they are not bugs in Folio and need no traceback."""
    try:
        yield
    except Exception as error:
        store = sys.modules.get("folio.tracking.store")  # if the command imported it
        if store is None or not isinstance(error, store.STORE_ERRORS):
            raise
        if isinstance(error, OSError):  # one_line_errors reports a full disk
            raise
        raise UserError(f"MLflow failed: {store.explain(error)}") from None
