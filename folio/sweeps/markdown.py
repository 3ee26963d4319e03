"""Markdown tables that are also aligned as plain text."""


def table(header: list[str], rows: list[list[str]]) -> str:
    """A Markdown table with right-aligned columns. Any text may be in a cell."""
    header, rows = [_escape(cell) for cell in header], [list(map(_escape, row)) for row in rows]
    widths = [max(2, *map(len, column)) for column in zip(header, *rows, strict=True)]
    rule = ["-" * (width - 1) + ":" for width in widths]
    lines = [
        " | ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True))
        for line in (header, rule, *rows)
    ]
    return "\n".join(f"| {line} |" for line in lines)


def _escape(cell: str) -> str:
    """A cell as one line, in which no character ends the cell or begins an HTML tag."""
    line = " ".join(cell.split())
    return line.replace("|", "\\|").replace("<", "&lt;")
