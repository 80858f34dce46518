"""Tables for people: aligned text for a terminal or a log, HTML for a notebook."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from html import escape

__all__ = ["html_table", "one_line", "text_table"]


def one_line(text: str) -> str:
    """Names come from users: a line break or an escape sequence must not tear a table."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def text_table(
    heads: Sequence[str], rows: Sequence[Sequence[str]], right: Collection[int] = ()
) -> list[str]:
    """Lines of an aligned table, indented by two.

    Args:
        heads: of the columns. The last column is not padded on its right.
        rows: what users wrote; made safe here.
        right: numbers of the columns that are aligned to the right.
    """
    table = [tuple(heads), *(tuple(map(one_line, row)) for row in rows)]
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    lines = []
    for cells in table:
        padded = [
            cell.rjust(width) if at in right else cell.ljust(width)
            for at, (cell, width) in enumerate(zip(cells, widths, strict=True))
        ]
        lines.append("  " + "  ".join(padded).rstrip())
    return lines


def html_table(
    heads: Sequence[str], rows: Sequence[Sequence[str]], right: Collection[int] = ()
) -> str:
    """A table without script or style sheet; ``rows`` are HTML already, ``heads`` are not."""

    def side(at: int) -> str:
        return "right" if at in right else "left"

    top = "".join(
        f'<th style="text-align:{side(at)}">{escape(head)}</th>' for at, head in enumerate(heads)
    )
    body = "".join(
        "<tr>"
        + "".join(f'<td style="text-align:{side(at)}">{cell}</td>' for at, cell in enumerate(row))
        + "</tr>"
        for row in rows
    )
    return f"<table><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table>"
