"""A program for tests: a parent that starts a worker, which says when it counts as started.

python started.py parent  starts a worker once the clock that dates processes has ticked
python started.py worker  prints three times: what it counts from, its parent's start, its own
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time

import psutil

from p2p_llm_forge.peers.launcher import first_started

own = psutil.Process().create_time()
if sys.argv[1] == "parent":
    while time.time() < own + 0.1:  # a tick lasts 0.01 s
        pass
    sys.exit(subprocess.run([sys.executable, __file__, "worker"]).returncode)
print(json.dumps([first_started(), psutil.Process(os.getppid()).create_time(), own]))
