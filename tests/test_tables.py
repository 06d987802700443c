"""Columns are aligned, whatever their cells hold."""

from p2p_llm_forge.tables import table

ROWS = [["name", "MB", "note"], ["a", "10.5", ""], ["longer", "1.0", "<- slowest"]]


def test_columns_are_aligned_and_lines_end_without_blanks():
    assert table(ROWS) == ["name    MB    note", "a       10.5", "longer  1.0   <- slowest"]


def test_numbers_are_aligned_at_their_end():
    assert table([row[:2] for row in ROWS], right=True) == [
        "name      MB",
        "a       10.5",
        "longer   1.0",
    ]
