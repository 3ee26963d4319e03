"""Markdown tables with any text in their cells."""

import pytest
from markdown_it import MarkdownIt

from folio.sweeps import markdown

CELLS = [
    "a|b",
    "||",
    "<b>",
    "<!--",
    "a\nb",
    "a\r\nb",
    "\r",
    "\n\n# x",
    "\u2028",
    "\f",
    "`|`",
    "-",
    "",
]


@pytest.mark.parametrize("cell", CELLS, ids=repr)
def test_table_has_one_row_per_row_whatever_a_cell_contains(cell):
    text = markdown.table(["param", cell], [[cell, "1"], ["x", "2"]])
    tokens = MarkdownIt("commonmark").enable("table").parse(text)
    kinds = [token.type for token in tokens]
    assert kinds.count("table_open") == 1 and kinds.count("tr_open") == 3
    cells = [token for token in tokens if token.type == "inline"]
    assert len(cells) == 6
    assert not any(child.type == "html_inline" for each in cells for child in each.children)


def test_table_is_aligned():
    assert markdown.table(["a", "bcd"], [["10", "x"]]) == "|  a | bcd |\n| -: | --: |\n| 10 |   x |"
