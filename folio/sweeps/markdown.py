"""Markdown tables, which are also aligned as plain text."""


def table(header: list[str], rows: list[list[str]]) -> str:
    """A Markdown table with right-aligned columns."""
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    rule = ["-" * (width - 1) + ":" for width in widths]
    lines = [
        " | ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True))
        for line in (header, rule, *rows)
    ]
    return "\n".join(f"| {line} |" for line in lines)
