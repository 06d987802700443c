"""train.py in a process whose first update may take only so many more bytes.

python -m tests.multiprocess.little_memory BYTES FLAGS
"""

from __future__ import annotations

import resource
import sys
from typing import Any

import psutil


def main() -> int:
    import train

    more, take_update = int(sys.argv.pop(1)), train.take_update

    def limited(run: Any, step: int) -> Any:
        if step == run.first_step:
            most = psutil.Process().memory_info().vms + more
            resource.setrlimit(resource.RLIMIT_AS, (most, resource.RLIM_INFINITY))
        try:
            return take_update(run, step)
        finally:
            resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY,) * 2)

    train.take_update = limited
    return train.main()


if __name__ == "__main__":
    from p2p_llm_forge.errors import run_script

    run_script(main)
