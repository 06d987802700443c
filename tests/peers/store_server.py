"""A program for tests: serves a store, prints its port, and waits to be killed."""

from __future__ import annotations

import threading

import torch.distributed as dist

if __name__ == "__main__":
    served = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    print(served.port, flush=True)
    threading.Event().wait()
