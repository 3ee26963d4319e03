"""When a run replaces the champion."""

from folio.cli.promote import reason_to_keep
from folio.tracking.queries import TrackedRun


def run(loss: float, **tags: str) -> TrackedRun:
    names = dict.fromkeys(("id", "folio_id", "name", "experiment", "status"), "")
    metrics = {"best_val_loss": loss}
    return TrackedRun(**names, started=0, ended=1, params={}, metrics=metrics, tags=tags)


def test_run_with_a_lower_loss_on_the_same_text_replaces_the_champion():
    champion = run(2.0, held_out_digest="a")
    assert reason_to_keep(champion, run(1.0, held_out_digest="a")) is None
    for loss in (2.0, 3.0):
        reason = reason_to_keep(champion, run(loss, held_out_digest="a"))
        assert reason == "its validation loss, 2.0000 nats/token, is not higher"


def test_losses_on_different_or_unknown_texts_are_not_comparable():
    for champion, other in (
        (run(2.0), run(1.0)),
        (run(2.0, held_out_digest="a"), run(1.0, held_out_digest="b")),
        (run(2.0, held_out_digest="a"), run(1.0)),
    ):
        reason = reason_to_keep(champion, other)
        assert reason and reason.startswith("the losses are not comparable")
