"""What lies in a folder, to the last byte, without following links."""

from __future__ import annotations

import os
from pathlib import Path


def tree(folder: Path) -> dict[str, object]:
    """Every file with its bytes, every link with its target, every folder."""
    found: dict[str, object] = {}
    for parent, folders, files in os.walk(folder):
        for name in (*folders, *files):
            path = Path(parent, name)
            key = path.relative_to(folder).as_posix()
            if path.is_symlink():
                found[key] = f"-> {os.readlink(path)}"
            else:
                found[key] = path.read_bytes() if path.is_file() else "a folder"
    assert found, f"{folder} is empty"
    return found
