"""A worker for tests: prints what it was started with, then does what its argument says."""

from __future__ import annotations

import os
import signal
import sys
import time

print(os.environ["RANK"], os.environ["LOCAL_RANK"], flush=True)
what = sys.argv[1]
if what == "fails-at-1":
    time.sleep(0 if os.environ["RANK"] == "1" else 600)
    sys.exit(7)
if what == "saves":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
if what == "hangs":
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
if what in ("saves", "hangs"):
    print("ready", flush=True)
    time.sleep(600)
