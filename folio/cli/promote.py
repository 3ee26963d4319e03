"""The best model so far, under the alias `champion`: what `make serve` serves."""

from folio.errors import UserError
from folio.tracking import registry
from folio.tracking.queries import TrackedRun, find_run
from folio.tracking.store import Store, exclusive


def promote(store: Store, name: str, force: bool = False) -> str:
    """Register a training's model, and make it the champion if its held-out loss is lower.

    name: as Store.run takes it. force: make it the champion whatever the losses say. Returns what
    was done and why. Raises UserError where the training has not ended, or has no model.
    """
    run = find_run(store, name)
    if run.status != "FINISHED":
        raise UserError(f"{run.name} is {run.status}: only a finished training is promoted")
    with exclusive():  # else two at once may both be better than the champion that they saw
        version = registry.register(store, run)
        what = f"{run.name} (version {version}, held-out {run.loss:.4f})"
        champion, number = registry.champion(store)
        if number == version:
            return f"{what} is the champion already"
        if champion and not force and (why := _why_not(run, champion)):
            return f"{what} is registered; version {number} stays the champion: {why}"
        registry.set_champion(store, version)
    return f"{what} is the champion now: {_why(run, champion, number)}"


def _why_not(run: TrackedRun, champion: TrackedRun) -> str | None:
    """Why a training does not replace the champion; None where it does."""
    theirs, ours = (kept.tags.get("held_out_digest") for kept in (champion, run))
    if ours is None or theirs != ours:
        return "they were not measured on the same held-out text, so their losses do not compare"
    if not run.loss < champion.loss:
        return f"its held-out loss, {champion.loss:.4f} nats a token, is not higher"
    return None


def _why(run: TrackedRun, champion: TrackedRun | None, number: str) -> str:
    if champion is None:
        return f"the training of version {number} is gone" if number else "there was none"
    if reason := _why_not(run, champion):
        return f"forced, though {reason}"
    return (
        f"{champion.loss - run.loss:.4f} nats a token below version {number}, on the same"
        " held-out text"
    )
