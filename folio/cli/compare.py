"""`python -m folio compare`: a table of MLflow runs."""

from typing import Annotated

import typer

from folio.cli.store import open_store
from folio.errors import UserError


def compare(
    runs: Annotated[
        list[str] | None, typer.Argument(help="Names or ids of runs; by default, the best runs.")
    ] = None,
    best: Annotated[
        int, typer.Option(min=1, help="How many of the best runs to show by default.")
    ] = 20,
) -> None:
    """Compare MLflow runs: their losses and differing params.

    Example: python -m folio compare

    Example: python -m folio compare 2x4x128-9e1c07 seed-30m
    """
    from rich.console import Console

    from folio.cli import run_tables
    from folio.tracking.queries import find_run, list_runs

    store = open_store()
    found = [find_run(store, name) for name in runs or []] or list_runs(store)
    if not found:
        raise UserError("MLflow has no runs yet: `dvc repro` creates the first one")
    console = Console(markup=False, emoji=False, highlight=False)  # a name may contain [red]
    if runs:
        for table in run_tables.column_per_run(found, console.width):
            console.print(table)
    else:
        found.sort(key=lambda run: (run.loss, -run.started))
        console.print(run_tables.row_per_run(found[:best], console.width))
        if len(found) > best:
            console.print(f"{len(found) - best} more: --best {len(found)} shows all")
    if len({run.tags.get("held_out_digest") for run in found}) > 1:
        console.print(
            "These runs have different validation texts, so some of the losses are not comparable."
        )
