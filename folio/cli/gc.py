"""`python -m folio gc`: free the disk space that nothing uses."""

from typing import Annotated

import typer


def gc(
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show what would be removed.")] = False,
    older_than: Annotated[
        float | None,
        typer.Option(
            min=0,
            metavar="DAYS",
            help="Also checkpoints of runs interrupted more than DAYS ago.",
        ),
    ] = None,
    own_cache: Annotated[
        bool,
        typer.Option(
            "--own-cache",
            help="Include a cache outside the project, which must be its own.",
        ),
    ] = False,
) -> None:
    """Free the disk space that nothing uses.

    Frees what no workspace, commit, stash, DVC experiment, registered model or run in MLflow uses:
    the data of removed runs, MLflow's trash, artifacts without a run, and copies of the project
    that a killed DVC left behind. It cannot be undone.

    Example: python -m folio gc --dry-run
    """
    from folio.cli import idle
    from folio.cli import inventory as project
    from folio.run import project_root
    from folio.tracking import garbage, sizes

    if dry_run:
        found = garbage.find(project.read(), older_than, own_cache)
        idle.leave_out_copies(found, project_root())
        lines, size = found.describe(), sizes.shown(sum(found.sizes().values()))
        result = f"dry run: gc would free {size}" if lines else "there is nothing to free"
        print("\n".join([*lines, *found.notes, result]))
        return
    with idle.project(project_root()):
        inventory = project.read()
        found = garbage.find(inventory, older_than, own_cache)
        lines = found.describe()
        freed = garbage.free(found, inventory)
    result = f"freed {sizes.shown(freed)}" if lines else "there is nothing to free"
    print("\n".join([*lines, *found.notes, result]))
