"""A Hub of one's own on 127.0.0.1: which datasets it has, what it is asked, whether it answers."""

from __future__ import annotations

import contextlib
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


@contextlib.contextmanager
def strange_hub(*datasets: str, silent: bool = False) -> Iterator[tuple[str, list[str]]]:
    """Yields its address and the list of what it is asked for. silent: it takes every question, and
    answers none before the end."""
    asked: list[str] = []
    over = threading.Event()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            if self.path.startswith("/api/datasets/"):  # and not what a library asks for itself
                asked.append(self.path)
            if silent:
                over.wait()
                return
            name = self.path.removeprefix("/api/datasets/").split("?")[0]
            is_there = name in datasets
            content = (
                {"id": name, "siblings": []} if is_there else {"error": "Repository not found"}
            )
            body = json.dumps(content).encode()
            self.send_response(200 if is_there else 404)
            if not is_there:
                self.send_header("X-Error-Code", "RepoNotFound")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        do_HEAD = do_GET

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, args=[0.01], daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}", asked
    finally:
        over.set()
        server.shutdown()
        server.server_close()
        thread.join()
