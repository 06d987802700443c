"""Files between hosts that share nothing: through kills, losses, damage and full disks."""

from __future__ import annotations

import json
import re

import pytest

from tests.multihost.disks import own_disks
from tests.multihost.hosts import hosts, why_not
from tests.multihost.ranks import MB, Ranks
from tests.waiting import wait_until

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(bool(why_not()), reason=why_not() or ""),
]


@pytest.fixture
def ranks(tmp_path, request):
    """As many as asked for; at so many Mbit/s, with disks of so many megabytes."""
    count, mbit, megabytes = request.param
    with hosts(count, mbit) as machines, own_disks(machines, tmp_path, megabytes) as disk:
        yield Ranks(machines, disk, tmp_path)


def of(count, mbit=None, megabytes=None):
    return pytest.mark.parametrize("ranks", [(count, mbit, megabytes)], indirect=True, ids=[""])


@of(2, 200)
def test_a_fetch_that_is_killed_10_times_sends_little_twice(ranks):
    ranks.make(a=50 * MB, b=30 * MB)
    ranks.serve()
    kills = 0
    for kill in range(10):
        log = ranks.fetch()
        wait_until(lambda: ranks.came() > kill * 7 * MB or log.read_text())  # noqa: B023
        assert not log.read_text()
        ranks.fetcher.switch_off()
        kills += 1
    log = ranks.fetch()
    assert ranks.fetcher.wait() == [0], log.read_text()
    received, _ = json.loads(log.read_text())
    assert kills == 10 and ranks.are_whole()
    assert 0 < received < 30 * MB
    assert ranks.fetcher.bytes_received() < (80 + 10 * 2 * 5) * MB  # two pieces under way


@of(4, 60)
def test_what_lost_sources_do_not_bring_another_does(ranks):
    ranks.make(a=45 * MB)
    ranks.serve()
    log = ranks.fetch()
    wait_until(lambda: ranks.came() > 12 * MB)
    ranks.sources[0].unplug()
    ranks.sources[1].switch_off()
    assert ranks.fetcher.wait() == [0], log.read_text()
    received, by_rank = json.loads(log.read_text())
    assert ranks.are_whole()
    assert min(by_rank.values()) > 0 and by_rank["2"] > 15 * MB
    assert received < 70 * MB


@of(3)
def test_a_damaged_file_is_found_by_its_hash_and_another_source_asked(ranks):
    ranks.make(a=20 * MB, b=100)
    with ranks.sources[0].disk.inside(ranks.disk / "from" / "a").open("r+b") as file:
        file.seek(9 * MB)
        file.write(b"\1something else")
    ranks.serve()
    log = ranks.fetch(asked=[0])
    assert ranks.fetcher.wait() == [2]
    assert re.search(r"a cannot be fetched from rank 0 \(host 0\): its file is damaged\n  fix: ",
                     log.read_text())  # fmt: skip
    assert not ranks.fetcher.disk.inside(ranks.disk / "into" / "a").exists()
    ranks.fetcher.switch_off()
    log = ranks.fetch()
    assert ranks.fetcher.wait() == [0], log.read_text()
    assert ranks.are_whole()


@of(2, None, {1: 60})
def test_too_small_a_disk_is_found_before_the_first_byte(ranks):
    ballast = ranks.fetcher.disk.backing / "ballast"
    ballast.write_bytes(bytes(36 * MB))
    ranks.make(a=20 * MB, b=10 * MB)
    ranks.serve()
    log = ranks.fetch()
    assert ranks.fetcher.wait() == [2]
    both = r"no room .*: 30,\d{3},\d{3} bytes are missing, 2\d,\d{3},\d{3} are free there"
    fix = r"\n  fix: make room there, (\d,\d{3},\d{3}) bytes more"
    found = re.search(both + fix, log.read_text())
    assert found, log.read_text()
    assert [*ranks.fetcher.disk.backing.iterdir()] == [ballast]
    assert ranks.fetcher.bytes_received() < MB
    with ballast.open("r+b") as file:  # in pages of the file system
        file.truncate((36 * MB - int(found[1].replace(",", ""))) // 4096 * 4096)
    ranks.fetcher.switch_off()
    log = ranks.fetch()
    assert ranks.fetcher.wait() == [0], log.read_text()
    assert ranks.are_whole()


@of(2, 200, {1: 60})
def test_what_came_before_a_disk_was_full_stays_for_the_next_try(ranks):
    ranks.make(a=45 * MB)
    ranks.serve()
    log = ranks.fetch()
    wait_until(lambda: ranks.came() > 10 * MB)
    ballast = ranks.fetcher.disk.backing / "ballast"
    with pytest.raises(OSError, match="No space left"):
        ballast.write_bytes(bytes(60 * MB))
    assert ranks.fetcher.wait() == [2]
    assert re.search(r"into cannot be written: No space left on device; what has come stays there"
                     r"\n  fix: make room", log.read_text())  # fmt: skip
    came = ranks.came()
    assert came > 10 * MB
    ballast.unlink()
    ranks.fetcher.switch_off()
    log = ranks.fetch()
    assert ranks.fetcher.wait() == [0], log.read_text()
    assert json.loads(log.read_text())[0] == 45 * MB - came
    assert ranks.are_whole()


@of(3)
def test_two_hosts_that_need_the_same_file_both_get_it(ranks):
    other = ranks.sources.pop()
    ranks.make(a=40 * MB)
    ranks.serve()
    logs = [ranks.fetch(host=host) for host in (ranks.fetcher, other)]
    for host, log in zip((ranks.fetcher, other), logs, strict=True):
        assert host.wait() == [0], log.read_text()
        assert ranks.are_whole(host)
