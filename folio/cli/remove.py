"""`python -m folio remove`: remove runs from MLflow and DVC."""

from typing import TYPE_CHECKING, Annotated

import typer

from folio.errors import UserError

if TYPE_CHECKING:
    from folio.tracking.inventory import Holdings, Inventory


def remove(
    runs: Annotated[
        list[str] | None, typer.Argument(help="Names or ids of runs, as `disk` lists them.")
    ] = None,
    everything: Annotated[
        bool,
        typer.Option("--all", help="Every run that no commit or registered model needs."),
    ] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show what would be removed.")] = False,
    undo: Annotated[bool, typer.Option("--undo", help="Restore runs from MLflow's trash.")] = False,
) -> None:
    """Remove runs from MLflow and DVC.

    Moves the run, its evaluations and its model to MLflow's trash, and deletes the versions of its
    registered model, the DVC experiments that show it, and its checkpoint. `gc` then frees the
    disk; until then, --undo restores everything except the checkpoint and the versions.

    Example: python -m folio remove seed-3 --dry-run

    Example: python -m folio remove --all
    """
    from folio.cli import inventory as project
    from folio.tracking import removal

    if bool(runs) == everything or (everything and undo):
        raise UserError("name the runs to remove, or use --all: `python -m folio disk` lists them")
    inventory = project.read()
    if undo:
        for name in runs or []:
            run = removal.find(inventory, name)
            print("\n  ".join([f"{run.name} is restored:", *removal.restore(inventory, run)]))
        print("`python -m folio sync` sends its model to MLflow again")
        return
    found = _all(inventory) if everything else _named(inventory, runs or [])
    lines = {run.id: removal.describe(inventory, run) for run in found}
    if not dry_run:
        removal.remove(inventory, [run for run in found if lines[run.id]])
    for run in found:
        print("\n  ".join([run.name, *(lines[run.id] or ["already removed"])]))
    _summarize(inventory, found, dry_run)


def _named(inventory: "Inventory", names: list[str]) -> "list[Holdings]":
    """The runs with these names. Raises UserError if one must be kept; then none is removed."""
    from folio.tracking import removal

    found = {run.id: run for run in (removal.find(inventory, name) for name in names)}
    for run in found.values():
        if reason := removal.reason_to_keep(inventory, run):
            raise UserError(f"{run.name} cannot be removed: {reason}")
    return list(found.values())


def _all(inventory: "Inventory") -> "list[Holdings]":
    """The runs that may be removed; prints a line for each of the others."""
    from folio.tracking import removal

    found = []
    for run in inventory.runs:
        reason = removal.reason_to_keep(inventory, run)
        if not reason and removal.is_elsewhere(inventory, run):
            reason = "this clone does not have its files; name it to remove it all the same"
        if not reason and run.versions:
            reason = f"version {run.versions[0].version} of {run.versions[0].name} is its model"
        if reason:
            print(f"{run.name} stays: {reason}")
        elif removal.describe(inventory, run):
            found.append(run)
    return found


def _summarize(inventory: "Inventory", found: "list[Holdings]", dry_run: bool) -> None:
    from folio.tracking import sizes

    if not found:
        print("there is nothing to remove")
        return
    used = inventory.usage.workspace | inventory.usage.commits
    freed = sum(inventory.size_of(run.objects - used) + run.in_mlflow for run in found)
    size = sizes.shown(freed)
    if dry_run:
        print(f"dry run: nothing was removed; `python -m folio gc` would then free {size}")
    else:
        print(f"`python -m folio gc` frees {size}; `remove --undo` works until then")
