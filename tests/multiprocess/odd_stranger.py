"""A stranger who reaches the store of a run that has no secret, and writes odd values there.

    python -m tests.multiprocess.odd_stranger PORT KEY VALUE

He writes until he is ended, or the store is.
"""

from __future__ import annotations

import datetime
import sys
import time

import torch.distributed as dist


def main(port: int, key: str, value: str) -> None:
    second = datetime.timedelta(seconds=1)
    store = None
    while True:
        try:
            store = store or dist.TCPStore("127.0.0.1", port, is_master=False, timeout=second)
            store.set(key, value)
        except RuntimeError:
            if store is not None:
                return  # the run is over
        time.sleep(0.01)


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2], sys.argv[3])
