"""`python -m folio disk`: what takes the space, and what can be freed."""

import shutil
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.table import Table

    from folio.tracking.garbage import Garbage
    from folio.tracking.inventory import Holdings, Inventory


def disk() -> None:
    """Show what takes the space, and what can be freed.

    A run's part of DVC's cache is what no other run uses. The column `kept by` shows why a run is
    kept; `gc` frees the runs that are `removed`.

    Example: python -m folio disk
    """
    from rich.console import Console

    from folio.cli import idle
    from folio.cli import inventory as project
    from folio.tracking import garbage, sizes

    inventory = project.read()
    found = garbage.find(inventory)
    idle.leave_out_copies(found, inventory.root)
    console = Console(markup=False, emoji=False, highlight=False)
    console.print(_places(inventory, found))
    if inventory.runs:
        console.print(_runs(inventory))
        console.print("`python -m folio remove RUN`, then `gc`, frees a run: docs/housekeeping.md")
    for note in found.notes:
        console.print(note, soft_wrap=True)
    console.print(f"free on this disk: {sizes.shown(shutil.disk_usage('.').free)}")


def _places(inventory: "Inventory", found: "Garbage") -> "Table":
    from folio.cli.run_tables import new_table
    from folio.run import UNFINISHED
    from folio.tracking import sizes

    root, store, cache = inventory.root, inventory.store, inventory.usage.folder
    mlruns = store.path.parent / "mlruns" if store and store.path else None
    rows = {
        "DVC's cache": (str(cache), sizes.of(cache)),
        "MLflow's artifacts": (str(mlruns or ""), sizes.of(mlruns) if mlruns else 0),
        "checkpoints": (UNFINISHED, sizes.of(root / UNFINISHED)),
        "DVC's temporary folders": (".dvc/tmp", sizes.of(root / ".dvc/tmp")),
        "workspace": ("models, data", sizes.of(root / "models") + sizes.of(root / "data")),
    }
    freed = found.sizes()
    table = new_table("place", "folder", "size", "gc frees")
    for name, (folder, size) in rows.items():
        if size:
            place = folder.removeprefix(f"{root}/")
            table.add_row(name, place, sizes.shown(size), _amount(freed.get(name, 0)))
    total = sum(size for _, size in rows.values())
    table.add_section()
    table.add_row("total", "", sizes.shown(total), _amount(sum(freed.values())))
    return table


def _runs(inventory: "Inventory") -> "Table":
    from folio.cli.run_tables import new_table

    usage = inventory.usage
    table = new_table("run", "kept by", "DVC", "MLflow", "checkpoint")
    own: set[str] = set()
    for run in inventory.runs:
        own |= run.objects
        amounts = (inventory.size_of(run.objects), run.in_mlflow, run.in_checkpoint)
        table.add_row(run.name, _state(inventory, run), *map(_amount, amounts))
    rest = inventory.size_of(usage.files.keys() - own)
    table.add_section()
    table.add_row("several runs, or none", "", _amount(rest), "", "")
    return table


def _state(inventory: "Inventory", run: "Holdings") -> str:
    """What keeps a run, in a word or two."""
    if run.is_training:
        return "training"
    if run.aliases:
        return run.aliases[0].partition("@")[2]
    if run.commit:
        return "commit"
    if run.is_in_workspace:
        return "workspace"
    if run.versions:
        return f"version {run.versions[0].version}"
    if inventory.is_removed(run.id):
        return "removed"
    if run.experiments:
        return "experiment"
    return "interrupted" if run.checkpoint else "run only"


def _amount(size: int) -> str:
    from folio.tracking import sizes

    return sizes.shown(size) if size else "-"
