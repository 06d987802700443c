"""A program for tests: one rank of an exchange of files, without the rest of a run.

python files.py serve RANK ADDRESS FOLDER SECRET        prints where it serves, as JSON, and serves
python files.py fetch RANK PLACES MANIFEST INTO SECRET  fetches, and prints what came, as JSON

SECRET: a text; empty for none. PLACES: what the others printed, by rank, as JSON; null for one that
is not asked. MANIFEST: size and sha256 by name, as JSON. The silence of a host counts after 3 s.
"""

from __future__ import annotations

import json
import sys
import threading
from pathlib import Path

from p2p_llm_forge.errors import ForgeError
from p2p_llm_forge.files import files_in
from p2p_llm_forge.peers.file_exchange import FileExchange, FileFacts, Place, Watch, listen
from p2p_llm_forge.peers.secret import Session

TIMEOUT_S = 3.0
NOWHERE = Place("", 0, "", "nowhere")


def exchange(rank: int, places: list[Place], server, secret: str) -> FileExchange:
    session = Session(secret.encode(), [{"nonce": 0}]) if secret else None
    return FileExchange(rank, places, server, session, TIMEOUT_S)


def serve(rank: str, address: str, folder: str, secret: str) -> int:
    server, facts = listen(address)
    own = {**facts, "host": f"host {rank}"}
    places = [Place(**own) if number == int(rank) else NOWHERE for number in range(8)]
    served = exchange(int(rank), places, server, secret)
    served.offer("all", Path(folder), files_in(Path(folder)))
    print(json.dumps(own), flush=True)
    threading.Event().wait()
    return 0


def fetch(rank: str, places: str, manifest: str, into: str, secret: str) -> int:
    known = json.loads(places)
    files = {name: FileFacts(*facts) for name, facts in json.loads(manifest).items()}
    sources = {number: "all" for number, place in enumerate(known) if place}
    by_rank = [Place(**place) if place else NOWHERE for place in known]
    files_of_all = exchange(int(rank), by_rank, None, secret)
    try:
        fetched = files_of_all.fetch(files, sources, Path(into), Watch())
    except ForgeError as error:
        print(f"error: {error}", flush=True)
        return 2
    print(json.dumps([fetched.bytes_received, fetched.bytes_by_rank]), flush=True)
    return 0


if __name__ == "__main__":
    act = {"serve": serve, "fetch": fetch}[sys.argv[1]]
    sys.exit(act(*sys.argv[2:]))
