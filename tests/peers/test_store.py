"""The store answers, or every call ends by its deadline, whatever became of its server."""

from __future__ import annotations

import datetime
import signal
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch.distributed as dist

from p2p_llm_forge.peers.store import Store, StoreLost
from tests import ROOT
from tests.waiting import wait_until

LONG = datetime.timedelta(days=1)


@pytest.fixture
def server():
    """A process that serves a store, and two connections to it."""
    words = [sys.executable, "-m", "tests.peers.store_server"]
    with subprocess.Popen(words, cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        port = int(process.stdout.readline())
        clients = [
            dist.TCPStore("127.0.0.1", port, is_master=False, timeout=LONG) for _ in range(2)
        ]
        yield process, clients
        process.kill()


def test_what_one_rank_sets_the_others_get(server):
    one, other = (Store(client, rank, 60) for rank, client in enumerate(server[1]))
    assert not other.check("key")
    one.set("key", "üç")
    other.set("own", "2")
    # torch's set does not wait: a question on another connection may reach the server before it.
    wait_until(lambda: other.check("key", "own"))
    assert not other.check("key", "none")
    assert other.get("key", 0) == "üç"
    assert one.get_all(["key", "own"], [0, 1]) == ["üç", "2"]
    for store in (one, other):
        store.close()
    with pytest.raises(StoreLost):
        one.check("key")


def test_a_wait_of_torch_does_not_keep_ours_waiting(server):
    store = Store(server[1][0], 0, 60)
    theirs = store.for_groups()
    waiting = threading.Thread(target=theirs.wait, args=(["later"], LONG))
    waiting.start()
    store.set("later", "")  # would wait for ever on one connection
    waiting.join(60)
    assert not waiting.is_alive()


@pytest.mark.parametrize("end", [signal.SIGSTOP, signal.SIGKILL])
def test_a_server_that_is_gone_is_given_up_by_every_thread(server, end):
    process, (client, _) = server
    store = Store(client, 0, 1.0)
    store.set("key", "")
    process.send_signal(end)
    if end == signal.SIGKILL:
        process.wait()

    def asks(number):
        with pytest.raises(StoreLost):
            for _ in range(1000):
                store.check("key") if number else store.set("key", "")

    with ThreadPoolExecutor(2) as threads:
        list(threads.map(asks, range(2)))
    with pytest.raises(StoreLost):
        store.get("key", 0)
