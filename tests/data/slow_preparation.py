"""prepare_data.py in small pieces; the first argument: seconds that every piece takes longer."""

from __future__ import annotations

import sys
import time

import prepare_data
from p2p_llm_forge.data import splits
from tests.data.preparations import make_pieces_small


def main() -> int:
    pause_s, right = float(sys.argv[1]), splits.encode_piece

    def slow(*arguments):
        time.sleep(pause_s)
        return right(*arguments)

    make_pieces_small()
    splits.encode_piece = slow
    return prepare_data.main(sys.argv[2:])
