"""A peer of benchmarks/fetch.py: train.py, whose rank 1 fetches from rank 0 when it is asked to.

    FETCHES=FOLDER python benchmarks/fetch_peer.py [flags of train.py]

FOLDER holds `from/`, of which rank 0 offers all files, and `manifest.json`. Rank 1 waits for a file
`ask-N` (N from 1 on), which says whether to fetch behind training: all files again and again, each
time from the first byte, until `stop-N` is there. Then it writes `done-N`: bytes and seconds.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import shutil
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from p2p_llm_forge.errors import run_script
from p2p_llm_forge.files import write_json
from p2p_llm_forge.peers import join as joining
from p2p_llm_forge.peers.file_exchange import FileExchange, FileFacts, GivenUp

FOLDER = Path(os.environ["FETCHES"])


def main() -> int | None:
    """Train, with files to fetch beside it."""
    as_it_is = joining.join

    @contextlib.contextmanager
    def join_with_files(*arguments: Any, **named: Any) -> Iterator[Any]:
        with as_it_is(*arguments, **named) as cluster:
            exchange = cluster.open_files()
            manifest = json.loads((FOLDER / "manifest.json").read_text())
            files = {name: FileFacts(*facts) for name, facts in manifest.items()}
            if cluster.rank == 0:
                exchange.offer("files", FOLDER / "from", files)
            else:
                threading.Thread(target=serve_asks, args=(exchange, files), daemon=True).start()
            yield cluster

    joining.join = join_with_files
    import train

    return train.main()


def serve_asks(exchange: FileExchange, files: dict[str, FileFacts]) -> None:
    """Fetch as long as is asked for, one ask after the other."""
    with contextlib.suppress(GivenUp):
        for number in itertools.count(1):
            while not (ask := FOLDER / f"ask-{number}").exists():
                time.sleep(0.02)
            wanted, into = json.loads(ask.read_text()), FOLDER / "into"
            received, began = 0, time.perf_counter()
            while not (FOLDER / f"stop-{number}").exists():
                shutil.rmtree(into, ignore_errors=True)
                fetched = exchange.fetch(files, {0: "files"}, into, None, wanted["behind"])
                received += fetched.bytes_received
            done = {"bytes": received, "seconds": time.perf_counter() - began}
            write_json(FOLDER / f"done-{number}", done)


if __name__ == "__main__":
    run_script(main)
