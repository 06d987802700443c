"""A worker that ends with its parent: started by `parent`, killed with it, or asked after it.

python orphan.py parent FILE        starts a worker, and waits
python orphan.py worker FILE PARENT  writes its process id to FILE, notes SIGTERM there, and waits
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from p2p_llm_forge.peers import parent

role, file = sys.argv[1], Path(sys.argv[2])
if role == "parent":
    subprocess.Popen([sys.executable, __file__, "worker", file, str(os.getpid())])
else:
    parent.TO_SAVE_S = 1.0

    def note(*_: object) -> None:
        file.with_suffix(".asked").touch()

    signal.signal(signal.SIGTERM, note)  # and do not end
    parent.end_with_parent(int(sys.argv[3]))
    file.with_suffix(".tmp").write_text(str(os.getpid()))
    file.with_suffix(".tmp").rename(file)
while True:
    time.sleep(600)
