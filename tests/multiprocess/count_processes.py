"""A program for tests: each process that a launcher starts leaves a file with how many there are.

Its argument: how the names of the files begin; they end with the rank.
"""

import os
import sys
from pathlib import Path

if __name__ == "__main__":
    rank, processes = os.environ.get("RANK", "alone"), os.environ.get("WORLD_SIZE", "1")
    Path(sys.argv[1] + rank).write_text(processes)
