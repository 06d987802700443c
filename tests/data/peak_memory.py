"""Run by tests: read a file, piece by piece, and print what came out and the largest memory."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

from p2p_llm_forge.data import sources
from p2p_llm_forge.data.parts import ReadOptions
from p2p_llm_forge.data.readers import read_pieces
from p2p_llm_forge.errors import ForgeError


def main() -> None:
    asked = ReadOptions(**json.loads(sys.argv[2]))
    documents, text_bytes, skipped, message = 0, 0, 0, ""
    try:
        for part in sources.find([sys.argv[1]], asked).parts:
            for piece in read_pieces(part, asked):
                documents += len(piece.column)
                text_bytes += piece.column.nbytes
                skipped += piece.skipped
    except ForgeError as error:
        message = str(error)
    # Not ru_maxrss, which begins with what the process had that started this one.
    (peak,) = re.findall(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    print(json.dumps([documents, text_bytes, skipped, message, int(peak) * 1024]))


if __name__ == "__main__":
    main()
