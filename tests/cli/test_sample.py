"""What `sample` prints to a terminal."""

from folio.cli.sample import _escape


def test_escape_disarms_control_characters():
    assert _escape("a\x1b[2J\tb\n“é”") == "a\\x1b[2J\tb\n“é”"
