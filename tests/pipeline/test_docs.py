"""The commands in the documentation run as written: a page's blocks in turn, in a tiny project.

A block is skipped when the line before it is `<!-- not run: why -->`; a line
`<!-- not run on this page: why -->` skips all blocks of a page.
"""

import os
import re
import sys
from pathlib import Path
from typing import NamedTuple

import matplotlib
import pytest
from conftest import ROOT, VERSES, run

DOCS = [page.relative_to(ROOT) for page in sorted(ROOT.glob("docs/*.md"))]
PAGES = [Path("README.md"), Path("CONTRIBUTING.md"), Path("LEADERBOARD.md"), *DOCS]
BLOCK = re.compile(
    r"^(?:<!-- not run:(?P<reason>.*?)-->\n)?```(?P<language>sh|python)\n(?P<text>.*?)^```$",
    re.MULTILINE | re.DOTALL,
)
WHOLE_PAGE = re.compile(r"^<!-- not run on this page:(.*?)-->$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\]\((?!https?:|#)([^)#]+)")


class Block(NamedTuple):
    page: Path
    line: int
    reason: str | None  # why it is not run
    language: str
    text: str


def blocks(page: Path) -> list[Block]:
    content = (ROOT / page).read_text(encoding="utf-8")
    found = list(BLOCK.finditer(content))
    assert len(found) == len(re.findall(r"^```(?:sh|python)\b", content, re.MULTILINE)), page
    whole = WHOLE_PAGE.search(content)
    return [
        Block(
            page,
            content[: match.start("text")].count("\n") + 1,
            whole[1] if whole else match["reason"],
            match["language"],
            match["text"],
        )
        for match in found
    ]


@pytest.fixture
def project(make_trained, tmp_path) -> Path:
    """A committed project after its first run, and beside it a home with two texts."""
    for name in ("diary.txt", "letters.txt"):
        (tmp_path / name).write_text(VERSES.replace("sea", name[:5]))
    return make_trained()


@pytest.mark.parametrize("page", PAGES, ids=str)
def test_page_commands_run_as_written(page, project, tmp_path):
    fonts = matplotlib.get_cachedir()  # a new home would search the system's fonts again
    commands = {"sh": ["bash", "-euc"], "python": [sys.executable, "-c"]}
    for block in blocks(page):
        if block.reason is None:
            command = [*commands[block.language], block.text]
            done = run(project, *command, HOME=str(tmp_path), MPLCONFIGDIR=fonts)
            assert done.returncode == 0, (
                f"{page}, line {block.line}: {done.stdout[-2000:]}{done.stderr[-2000:]}"
            )


@pytest.mark.parametrize("page", PAGES, ids=str)
def test_block_that_is_not_run_has_a_reason(page):
    for block in blocks(page):
        assert block.reason is None or len(block.reason.split()) >= 3, f"{page}, {block.line}"


@pytest.mark.parametrize("page", PAGES, ids=str)
def test_page_links_lead_to_existing_files(page):
    for link in LINK.findall((ROOT / page).read_text(encoding="utf-8")):
        assert Path(os.path.normpath(ROOT / page.parent / link)).exists(), f"{page}: {link}"
