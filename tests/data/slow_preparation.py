"""prepare_data.py in small pieces; the first argument: seconds that every piece takes longer."""

from __future__ import annotations

import sys
import time

import prepare_data
from p2p_llm_forge.data import ranks, splits
from p2p_llm_forge.errors import run_script
from tests.data.preparations import make_pieces_small

pause_s = float(sys.argv.pop(1))
right = splits.encode_piece


def slow(*arguments):
    time.sleep(pause_s)
    return right(*arguments)


if __name__ == "__main__":
    make_pieces_small()
    ranks.GONE_AFTER_S = 4.0
    splits.encode_piece = slow
    run_script(lambda: prepare_data.main(sys.argv[1:]))
