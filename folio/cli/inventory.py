"""The inventory of the project in the current folder, for the commands that use it."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from folio.tracking.inventory import Inventory


def read() -> "Inventory":
    """What each run has on disk. Raises UserError if MLflow, git or DVC fails.

    Without an MLflow store, there are still checkpoints and what is in DVC's cache.
    """
    from folio.cli.store import open_store, tracking_uri
    from folio.run import project_root
    from folio.tracking import store
    from folio.tracking.inventory import Inventory

    opened = open_store() if store.exists(tracking_uri()) else None
    return Inventory(project_root(), opened)
