"""Renders results as a Markdown table, which is readable as plain text too."""

from __future__ import annotations

from collections.abc import Sequence

from benchmarks.runner import Spread


def table(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Render a table; the first column is text, the others are figures."""
    widths = [max(len(row[column]) for row in (headings, *rows)) for column in range(len(headings))]

    def line(cells: Sequence[str]) -> str:
        first, *others = (
            cell.ljust(width) if column == 0 else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(cells, widths, strict=True))
        )
        return f"| {' | '.join([first, *others])} |"

    rule = ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])]
    return "\n".join([line(headings), line(rule), *(line(row) for row in rows)])


def shown(spread: Spread | None, digits: int = 2, scale: float = 1.0) -> str:
    """Show a median with its smallest and largest value; a dash where there is none."""
    if spread is None:
        return "-"
    median, low, high = (
        f"{number * scale:.{digits}f}" for number in (spread.median, spread.low, spread.high)
    )
    return median if low == high else f"{median} ({low}-{high})"
