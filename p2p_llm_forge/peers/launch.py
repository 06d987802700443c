"""The only place that reads what a launcher says in the environment. Imports no heavy library."""

from __future__ import annotations

import os


def local_rank() -> int:
    """The number of this process on its machine; 0 without a launcher."""
    return int(os.environ.get("LOCAL_RANK", "0"))
