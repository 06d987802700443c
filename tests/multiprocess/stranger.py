"""A stranger who reaches the store of a run and knows no secret: he answers before a rank does.

    python -m tests.multiprocess.stranger PORT

He writes what rank 1 would say in rounds to come, with other tokens, until the run has ended.
"""

from __future__ import annotations

import datetime
import json
import sys

import torch.distributed as dist

AHEAD = 2000
ANSWER = json.dumps({"is_finite": True, "tokens": [1]})


def main(port: int) -> None:
    second = datetime.timedelta(seconds=1)
    store = dist.TCPStore("127.0.0.1", port, is_master=False, timeout=second)
    try:
        while True:
            for number in range(1, AHEAD):
                key = f"forge/{number}/1"
                if not store.check([key]):
                    store.set(key, ANSWER)
    except RuntimeError:
        return  # the run is over


if __name__ == "__main__":
    main(int(sys.argv[1]))
