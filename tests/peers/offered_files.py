"""Files of random content to offer, and what has become of them elsewhere."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

from p2p_llm_forge.peers.file_exchange import FileFacts

MANY_PIECES = 30_000_001  # bytes


def made(folder: Path, sizes: dict[str, int]) -> dict[str, FileFacts]:
    """Random files, and what a manifest says of them."""
    facts = {}
    for name, size in sizes.items():
        content = os.urandom(size)
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
        facts[name] = FileFacts(size, hashlib.sha256(content).hexdigest())
    return facts


def same(one: Path, other: Path, names) -> bool:
    """Whether the files of these names are alike in both folders."""
    assert names
    return all((one / name).read_bytes() == (other / name).read_bytes() for name in names)


def everything_in(folder: Path) -> set[str]:
    """The names of all files below a folder."""
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def damage(path: Path) -> None:
    """Change one bit, in the middle of a file."""
    with path.open("r+b") as file:
        file.seek(path.stat().st_size // 2)
        (byte,) = file.read(1)
        file.seek(-1, 1)
        file.write(bytes([byte ^ 4]))
