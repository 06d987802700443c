"""Who is on the way between two hosts reads nothing and changes nothing where there is a secret."""

from __future__ import annotations

import contextlib
import os
import secrets
import signal
import struct

import pytest

from tests.multihost.hosts import PYTHON, hosts, why_not
from tests.ports import free_port
from tests.runs import LONG, flags, lines, read, step_logged
from tests.waiting import wait_until

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(bool(why_not()), reason=why_not() or ""),
]
# The weights that a layer norm begins with: they are among the first that rank 0 sends.
ONES = struct.pack("<f", 1.0) * 16


@contextlib.contextmanager
def man_on_the_way(machines, main_port, folder):
    """On every host, all but the store's connections go through him. Gives his trigger."""
    folder.mkdir()
    trigger, his_port = folder / "trigger", free_port()
    for number, host in enumerate(machines):
        capture = folder / f"capture-{number}"
        host.start(
            *(PYTHON, "-m", "tests.multihost.man_in_the_middle", his_port, capture, trigger),
            log=folder / "man.log",
        )
        wait_until(lambda host=host: f":{his_port} " in host.run("ss", "-ltn"))
        host.run(
            "nft",
            "add table ip man; add chain ip man out { type nat hook output priority -100; };"
            f" add rule ip man out ip daddr != 127.0.0.0/8 ip daddr != {host.address}"
            f" meta mark != 1 tcp dport != {main_port} redirect to :{his_port}",
        )
    yield trigger
    for host in machines:
        host.run("nft", "delete table ip man")


def start(zygote, machines, words, main_port, log):
    words = [*words, "--world-size=2", f"--master-addr={machines[0].address}"]
    words += [f"--master-port={main_port}"]
    return [
        zygote.start([*words, f"--rank={rank}"], log, host=host.name)
        for rank, host in enumerate(machines)
    ]


def heard(folder):
    return b"".join((folder / f"capture-{number}").read_bytes() for number in range(2))


def test_who_listens_reads_nothing_and_who_changes_a_bit_ends_the_run(zygote, prepared, tmp_path):
    file, settings = tmp_path / "secret", {**LONG, "resume": None, "lr_scheduler": "constant"}
    file.touch(mode=0o600)
    file.write_text(secrets.token_hex(32))
    plain, sealed = tmp_path / "plain", tmp_path / "sealed"
    with hosts(2) as machines:
        port, log = free_port(), tmp_path / "log"
        with man_on_the_way(machines, port, tmp_path / "him") as trigger:
            words = flags(prepared, sealed, **settings, cluster_secret_file=file)
            ranks = start(zygote, machines, words, port, log)
            wait_until(lambda: step_logged(sealed) >= 3)
            trigger.touch()
            assert [zygote.wait(pid) for pid in ranks] == [1, 1], read(log)
        encrypted = heard(tmp_path / "him")
        for host in machines:
            host.switch_off()

        port, log_of_plain = free_port(), tmp_path / "plain.log"
        with man_on_the_way(machines, port, tmp_path / "again"):
            ranks = start(zygote, machines, flags(prepared, plain, **settings), port, log_of_plain)
            wait_until(lambda: step_logged(plain) >= step_logged(sealed))
            os.kill(ranks[0], signal.SIGTERM)
            assert [zygote.wait(pid) for pid in ranks] == [143, 143], read(log_of_plain)
        in_plain = heard(tmp_path / "again")

    printed = read(log)
    assert "does not open with the cluster's secret: it was changed on the way" in printed
    assert "nothing was trained on it" in printed and "Traceback" not in printed
    seen = lines(sealed)
    assert len(seen) >= 3 and seen == lines(plain)[: len(seen)]
    assert len(encrypted) > 200_000 and ONES in in_plain, "he hears the run"
    assert ONES not in encrypted
