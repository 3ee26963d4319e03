"""docs/memorization.md and LEADERBOARD.md have the figures that benchmarks.compressors computes."""

import re

from conftest import ROOT

from benchmarks import compressors
from folio.corpus import shakespeare


def test_documented_losses_of_compressors_are_those_computed(plays, monkeypatch):
    monkeypatch.setattr(shakespeare, "read_plays", lambda: plays)
    text, start = shakespeare.load_tinyshakespeare()
    before, validation = text[:start].encode(), text[start:].encode()
    total = compressors.nats(compressors.COMPRESSORS["PPMd, order 6"], before, validation)
    row = compressors.row("tinyshakespeare: PPMd, order 6", total, len(validation), 36_059)
    bits, nats, per_token = re.findall(r"\d\.\d{3}", row)
    page = (ROOT / "docs/memorization.md").read_text()
    assert f"| tinyshakespeare: PPMd, order 6 | {bits} | {nats} | {per_token} |" in page
    assert f"| tinyshakespeare | {per_token} | {nats} |" in (ROOT / "LEADERBOARD.md").read_text()
