"""Hosts with disks of their own see one path each for itself, and nothing of the other's."""

from __future__ import annotations

import pytest

from tests.multihost.disks import own_disks
from tests.multihost.hosts import PYTHON, hosts, why_not

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(bool(why_not()), reason=why_not() or ""),
]


def test_one_path_is_another_folder_on_each_host_and_the_others_are_invisible(tmp_path, zygote):
    (tmp_path / "of the test").write_text("not for hosts")
    with hosts(2) as machines, own_disks(machines, tmp_path) as disk:
        for host in machines:
            listing = f"echo {host.name} >> {disk}/name; find {tmp_path.parent} -type f"
            host.start("sh", "-c", listing, log=tmp_path / f"{host.name}.log")
            assert host.wait() == [0]
            assert (tmp_path / f"{host.name}.log").read_text() == f"{disk}/name\n"
            assert (host.disk.backing / "name").read_text() == f"{host.name}\n"
        one, other = machines
        log = tmp_path / "zygote.log"
        script = "tests.multihost.appends"
        pid = zygote.start([str(disk / "name")], log, script=script, host=one.name, disk=one.disk)
        assert zygote.wait(pid) == 0, log.read_text()
        assert one.disk.inside(disk / "name").read_text() == f"{one.name}\n{one.name}\n"
        one.disk.destroy()
        assert not list(one.disk.backing.iterdir()) and list(other.disk.backing.iterdir())
    assert not (tmp_path / "disk").exists()


def test_a_small_disk_fills_up(tmp_path):
    with hosts(1) as (host,), own_disks([host], tmp_path, {0: 2}) as disk:
        writing = f"open('{disk}/a', 'wb').write(bytes(3 << 20))"
        host.start(PYTHON, "-c", writing, log=tmp_path / "log")
        assert host.wait() == [1]
        assert "No space left on device" in (tmp_path / "log").read_text()
        assert (tmp_path / "disk-0/a").stat().st_size <= 2 << 20
    assert not (tmp_path / "disk-0/a").exists()
