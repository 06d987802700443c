"""A kill between two changes of the names in a folder, wherever one can fall."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest


class Killed(BaseException):
    """Nothing that is written anywhere catches it."""


def killed_at(number: int, act: Callable[[], Any]) -> bool:
    """Whether `act` came to the change of this number, and ended there like a process that is
    killed; else it has ended by itself."""
    left = [number]

    def killing(change: Callable[..., Any]) -> Callable[..., Any]:
        def step(*args: Any, **options: Any) -> Any:
            left[0] -= 1
            if not left[0]:
                raise Killed
            return change(*args, **options)

        return step

    with pytest.MonkeyPatch.context() as patched:
        for name in ("rename", "replace", "unlink", "rmdir"):
            patched.setattr(Path, name, killing(getattr(Path, name)))
        try:
            act()
        except Killed:
            return True
    return False
