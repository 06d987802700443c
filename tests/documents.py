"""The documents as tests read them: pages, blocks, and the lines that a reader types."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass

import pytest

from tests import ROOT

READMES = ["README.md", "README.tr.md"]
DOCS = sorted(str(path.relative_to(ROOT)) for path in (ROOT / "docs").glob("*.md"))
OTHERS = ["CONTRIBUTING.md", "CHANGELOG.md"]
OTHERS += [f"{folder}/README.md" for folder in ("accelerate_configs", "benchmarks", "data")]
PAGES = [*READMES, *DOCS, *OTHERS]
BLOCK = r"^(?P<indent> *)```{}\n(?P<text>.*?)^(?P=indent)```$"
ON_MACHINE = re.compile(r"# machine (\d+)\b")
ON_EVERY_MACHINE = "# every machine"


@dataclass(frozen=True)
class Line:
    """A line that a reader types. machine: its number, where the block gives it to one; -1: all."""

    text: str
    machine: int | None = None


def text_of(page: str) -> str:
    """The page as it stands."""
    return (ROOT / page).read_text(encoding="utf-8")


def blocks(text: str, language: str) -> list[str]:
    """The contents of all code blocks in a language, without the indent of the list they are in."""
    found = re.finditer(BLOCK.format(language), text, re.DOTALL | re.MULTILINE)
    return [re.sub(rf"^{one['indent']}", "", one["text"], flags=re.MULTILINE) for one in found]


def lines_of(block: str) -> Iterator[Line]:
    """The lines that are typed, and where: after `# machine N` one on each, else on this one."""
    machine = None
    for line in block.splitlines():
        if found := ON_MACHINE.match(line):
            machine = int(found[1])
        elif line == ON_EVERY_MACHINE:
            machine = -1
        elif line.strip() and not line.startswith("#"):
            yield Line(line, machine)


def commands(page: str) -> list[str]:
    """The command lines in the page's bash blocks, in order, without comments."""
    return [line.text for block in blocks(text_of(page), "bash") for line in lines_of(block)]


def tracked() -> list[str]:
    """The files that git keeps, and new ones that it will."""
    words = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=False)
    if listed.returncode:
        pytest.skip("needs a git checkout: clone the project to run this")
    return [name for name in listed.stdout.splitlines() if (ROOT / name).is_file()]


def headings(text: str) -> list[str]:
    """The headings of a page, without their signs; those in code blocks are none."""
    prose = re.sub(r"^ *```.*?^ *```$", "", text, flags=re.DOTALL | re.MULTILINE)
    return re.findall(r"^#+ (.*)$", prose, re.MULTILINE)


def anchor(heading: str) -> str:
    """What GitHub makes of a heading, for links to it."""
    words = re.sub(r"\[([^\]]*)\]\([^)]*\)|`", r"\1", heading).strip().lower()
    return re.sub(r"[^\w\- ]", "", words).replace(" ", "-")
