"""A program for tests: a script that stops for ever where it comes to a phase of its run.

SCRIPT names it: train or check_cluster. HELD names the phase by a function, as `module:name`, and
after a second colon how many of its calls go through. Once it stands there, it makes the file that
MARK names. Without HELD nothing stops it.
"""

from __future__ import annotations

import functools
import importlib
import os
import threading
from pathlib import Path
from typing import Any


def hold(where: str, mark: Path) -> None:
    """Let a function never return, once it was called more often than it may be."""
    module, path, *passes = where.split(":")
    *owner, name = path.split(".")
    holder: Any = importlib.import_module(module)
    for part in owner:
        holder = getattr(holder, part)
    original, left = getattr(holder, name), int(passes[0]) if passes else 0

    @functools.wraps(original)
    def held(*args: Any, **named: Any) -> Any:
        nonlocal left
        if left:
            left -= 1
            return original(*args, **named)
        mark.touch()
        threading.Event().wait()

    setattr(holder, name, held)


def main() -> int:
    if where := os.environ.get("HELD"):
        hold(where, Path(os.environ["MARK"]))
    return importlib.import_module(os.environ["SCRIPT"]).main()
