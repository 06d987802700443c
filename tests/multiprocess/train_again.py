"""A program for tests: a notebook, whose process trains with a peer, loses it, and trains alone.

Its arguments are JSON: the settings of the first training and of the second.
"""

from __future__ import annotations

import json
import sys
import threading

from p2p_llm_forge.config import TrainConfig
from p2p_llm_forge.errors import ForgeError
from train import train


def main() -> int:
    together, alone = map(json.loads, sys.argv[1:])
    try:
        train(TrainConfig(**together))
    except ForgeError as error:
        print(f"caught: {error}", flush=True)
    left = [thread.name for thread in threading.enumerate() if not thread.daemon]
    print(f"threads: {left}", flush=True)
    train(TrainConfig(**alone))
    return 0
