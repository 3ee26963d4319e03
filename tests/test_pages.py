"""The text of the pages in docs/; tests/pipeline/test_docs.py runs their commands."""

import re

import pytest
from conftest import ROOT

PAGES = sorted((ROOT / "docs").glob("*.md"))
CODE = re.compile(r"^```.*?^```", re.DOTALL | re.MULTILINE)


@pytest.mark.parametrize("page", PAGES, ids=[page.name for page in PAGES])
def test_page_has_lines_of_at_most_120_characters(page):
    lines = CODE.sub("", page.read_text(encoding="utf-8")).splitlines()
    assert [line for line in lines if len(line) > 120 and not line.startswith(("|", "<!--"))] == []
