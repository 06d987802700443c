"""Strangers at the port of a rank that serves files get nothing, and keep nobody from it."""

from __future__ import annotations

import json

import psutil
import pytest

from tests.multihost.disks import own_disks
from tests.multihost.hosts import PYTHON, hosts, why_not
from tests.multihost.ranks import MB, SECRET, STRANGER, Ranks
from tests.waiting import wait_until

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(bool(why_not()), reason=why_not() or ""),
]
HIS_PORT = 4444
NONCE_BYTES = 32  # all that he may hear


@pytest.mark.parametrize("secret", [SECRET, ""])
def test_a_stranger_gets_nothing_and_keeps_nobody_from_it(tmp_path, secret):
    capture, trigger = tmp_path / "capture", tmp_path / "trigger"
    with hosts(3) as (source, stranger, fetcher):
        machines = [source, fetcher]
        with own_disks(machines, tmp_path) as disk:
            ranks = Ranks(machines, disk, tmp_path, secret)
            ranks.make(a=20 * MB)
            ranks.serve()
            port = ranks.places[0]["port"]
            words = ["listen", HIS_PORT, source.address, port, capture, trigger]
            stranger.start(PYTHON, STRANGER, *words, log=tmp_path / "listening")
            wait_until(lambda: (tmp_path / "listening").read_text())
            own = ranks.places[0]
            ranks.places = [{**own, "address": stranger.address, "port": HIS_PORT}]
            log = ranks.fetch()
            assert fetcher.wait() == [0], log.read_text()
            assert ranks.are_whole()
            content = fetcher.disk.inside(disk / "into" / "a").read_bytes()
            heard = (tmp_path / "capture.heard").read_bytes()
            assert len(heard) > 20 * MB
            assert (content[10 * MB :][:64] in heard) == (not secret)

            log = tmp_path / "attack"
            stranger.start(PYTHON, STRANGER, "attack", source.address, port, capture, log=log)
            wait_until(lambda: "holding" in log.read_text(), log=log)
            tries = [json.loads(line) for line in log.read_text().splitlines()[:-1]]
            assert len(tries) == 11 and {size for _, size in tries} <= {0, NONCE_BYTES}
            serving = psutil.Process(source.pids()[0])
            assert serving.num_threads() < 150
            ranks.places, found = [own], fetcher.disk.inside(disk / "into")
            (found / "a").unlink()
            fetcher.switch_off()
            log_of_rank = ranks.fetch()
            assert fetcher.wait() == [0], log_of_rank.read_text()
            assert ranks.are_whole()
            if secret:  # the slow ones need their time, and are cut off alike
                wait_until(lambda: "over" in log.read_text(), log=log)
                wait_until(lambda: serving.num_threads() < 10)


def test_who_changes_a_bit_on_the_way_changes_no_file(tmp_path):
    trigger = tmp_path / "trigger"
    with hosts(3) as (source, stranger, fetcher):
        machines = [source, fetcher]
        with own_disks(machines, tmp_path) as disk:
            ranks = Ranks(machines, disk, tmp_path)
            ranks.make(a=20 * MB)
            ranks.serve()
            words = ["listen", HIS_PORT, source.address, ranks.places[0]["port"]]
            words += [tmp_path / "capture", trigger]
            stranger.start(PYTHON, STRANGER, *words, log=tmp_path / "listening")
            wait_until(lambda: (tmp_path / "listening").read_text())
            own = ranks.places[0]
            trigger.touch()
            ranks.places = [{**own, "address": stranger.address, "port": HIS_PORT}]
            log = ranks.fetch()
            assert fetcher.wait() == [2]
            assert "what it sent does not open with the cluster's secret" in log.read_text()
            trigger.unlink()
            fetcher.switch_off()
            log = ranks.fetch()
            assert fetcher.wait() == [0], log.read_text()
            assert ranks.are_whole()


def test_a_rank_with_another_secret_gets_nothing(tmp_path):
    with hosts(2) as machines, own_disks(machines, tmp_path) as disk:
        ranks = Ranks(machines, disk, tmp_path)
        ranks.make(a=1000)
        ranks.serve()
        for secret in ("of another cluster", ""):
            ranks.secret = secret
            log = ranks.fetch()
            assert machines[1].wait() == [2]
            assert "a cannot be fetched from rank 0 (host 0): it" in log.read_text()
            machines[1].switch_off()
        assert ranks.came() == 0
