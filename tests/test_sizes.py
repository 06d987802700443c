"""benchmarks/sizes.py, whose table is in the README: one dry run, as the script makes twelve."""

from __future__ import annotations

import re

import pytest

from benchmarks import sizes
from tests.documents import READMES, text_of
from tests.texts import write_text


@pytest.mark.slow
def test_a_dry_run_becomes_a_row(tmp_path):
    text = write_text(tmp_path / "corpus.txt", documents=400)
    folder = sizes.prepared(text, tmp_path)
    printed = sizes.dry_run(folder, 30)
    row = sizes.planned(printed, "small", 30)
    assert f"qwen3, {row.parameters_m:.2f} M parameters" in printed
    assert 0 < row.with_peer < 8 and 0 < row.bits_per_byte < 8 and row.epochs > 1
    assert row.ends_early, "half an hour is far too long for a text of a few kilobytes"
    assert not (tmp_path / f"prepared-{text.stem}-run").exists(), "a dry run writes nothing"
    assert f"| small | 30 min, ends early | {row.depth} |" in sizes.table([row])


def test_what_is_no_plan_is_refused_with_what_was_printed():
    with pytest.raises(ValueError, match="no plan in\nerror: too small"):
        sizes.planned("error: too small", "none", 5)


def test_the_tables_are_those_that_the_script_prints():
    """As many rows and columns, for the texts and times of the script, the same in all pages."""
    pattern = re.compile(r"<!-- sizes -->\n\n(.*?)\n\n<!-- end -->", re.DOTALL)
    pages = [*READMES, "docs/sizes.md"]
    *short, long = [pattern.findall(text_of(page))[0].splitlines() for page in pages]
    assert short[0][2:] == short[1][2:] and len(short[0]) == 2 + 3
    assert short[0][0].split(" | ")[1:] == [*map(sizes.time_of, sizes.MINUTES[:-1]), "8 h |"]
    assert long[0] == f"| {' | '.join(sizes.HEAD)} |" and len(long) == 2 + 3 * len(sizes.MINUTES)
    cells = [row.strip("| ").split(" | ") for row in long[2:]]
    parameters = [cell.split(",")[0] for row in short[0][2:] for cell in row.split(" | ")[1:]]
    assert parameters == [row[3] for row in cells], "the short table is another one's"
