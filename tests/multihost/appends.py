"""A program for tests: writes the name of its host behind what a file holds."""

from __future__ import annotations

import platform
import sys


def main() -> int:
    with open(sys.argv[1], "a") as file:
        file.write(platform.node() + "\n")
    return 0
