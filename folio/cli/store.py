"""The MLflow store set in params.yaml, for the commands that use it."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from folio.tracking.store import Store


def tracking_uri() -> str | None:
    """runtime.tracking_uri in params.yaml; None for the default store."""
    from folio import params
    from folio.runtime import RuntimeParams

    (runtime,) = params.load(runtime=RuntimeParams)
    return runtime.tracking_uri


def open_store() -> "Store":
    """Connect to the store. Raises UserError if it does not exist or respond."""
    from folio.tracking.store import Store

    return Store.existing(tracking_uri())
