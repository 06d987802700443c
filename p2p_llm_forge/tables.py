"""Rows of text as a table for people."""

from __future__ import annotations

from collections.abc import Sequence


def table(rows: Sequence[Sequence[str]], right: bool = False) -> list[str]:
    """The rows (of equal length), their columns aligned and two spaces apart, a line each.

    right: columns but the first are aligned at their right end, as numbers want it.
    """
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(
            cell.rjust(width) if right and number else cell.ljust(width)
            for number, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]
