"""Hosts that share nothing bring each other the data and the model of a run of train.py."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

import pytest

from tests.folders import tree
from tests.multihost.disks import own_disks
from tests.multihost.hosts import PYTHON, hosts, why_not
from tests.runs import finish, flags, loaded, read
from tests.texts import write_manifest
from tests.using.models import save_model
from tests.waiting import wait_until

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(bool(why_not()), reason=why_not() or ""),
]
MB = 1_000_000
NAME, COMMIT = "mara/tiny", "0123456789abcdef0123456789abcdef01234567"
SIZE = {"batch_size": 6}  # for two and three ranks
LOADED = {"model_type": None, "config_overrides": None}


class Launch:
    """A run by hand on hosts, the same line on each but for its rank."""

    def __init__(self, zygote, machines, disk, tmp_path) -> None:
        self.zygote, self.machines, self.disk = zygote, machines, disk
        self.log = tmp_path / "launch.log"
        self.port = 29_500

    def at(self, host: int, name: str) -> Path:
        """Where the test finds what a host calls `name` on its disk."""
        return self.machines[host].disk.inside(self.disk / name)

    def words(self, rank: int, hosts: Sequence[int], **settings) -> list[str]:
        together = {"world_size": len(hosts), "rank": rank, "master_port": self.port}
        together["master_addr"] = self.machines[hosts[0]].address
        return flags(self.disk / "data", self.disk / "run", **together, **{**SIZE, **settings})

    def start(self, *hosts: int, **settings) -> list[int]:
        """Start on these hosts, the main one first; process ids."""
        self.log.unlink(missing_ok=True)
        self.port += 1
        pids = []
        for rank, number in enumerate(hosts):
            host, words = self.machines[number], self.words(rank, hosts, **settings)
            pids.append(self.zygote.start(words, self.log, host=host.name, disk=host.disk))
        return pids

    def statuses(self, pids) -> list[int]:
        return [self.zygote.wait(pid) for pid in pids]

    def kill(self, pids) -> None:
        """As a power cut of all machines does."""
        for pid in pids:
            os.kill(pid, 9)
        self.statuses(pids)

    def is_announced(self) -> bool:
        """Whether it was said what travels."""
        return self.log.exists() and " Mbit/s\n" in self.log.read_text()

    def megabytes_announced(self) -> float:
        return float(re.search(r"data +(\S+) MB from rank 0 \(", self.log.read_text())[1])


@pytest.fixture
def launch(zygote, tmp_path, request):
    """count, mbit: of the hosts; megabytes: of the disk of rank 1."""
    count, mbit, megabytes = request.param
    sizes = {1: megabytes} if megabytes else None
    with hosts(count, mbit) as machines, own_disks(machines, tmp_path, sizes) as disk:
        yield Launch(zygote, machines, disk, tmp_path)


def on(count, mbit=None, megabytes=None):
    return pytest.mark.parametrize("launch", [(count, mbit, megabytes)], indirect=True, ids=[""])


@pytest.fixture(scope="session")
def large(prepared, tmp_path_factory):
    """A prepared dataset of 80 MB, most of which is in the folder of its tokenizer."""
    folder = tmp_path_factory.mktemp("large") / "data"
    shutil.copytree(prepared, folder)
    (folder / "tokenizer" / "a.bin").write_bytes(content := os.urandom(80 * MB))
    manifest = json.loads((folder / "manifest.json").read_text())
    sha256 = hashlib.sha256(content).hexdigest()
    manifest["files"]["tokenizer/a.bin"] = {"bytes": len(content), "sha256": sha256}
    write_manifest(folder, manifest)
    return folder


def same_data(one: Path, other: Path) -> bool:
    there = tree(other)
    return there.pop("fetched.json", None) is not None and there == tree(one)


def pieces_here(folder: Path) -> int:
    """How many pieces of 4 MB of the large file have come."""
    records = folder.rglob("a.bin.part.pieces")
    return sum(record.read_bytes().partition(b"\n")[2].count(1) for record in records)


def cached(model: Path, home: Path) -> None:
    """The model in a cache of the Hub, as huggingface_hub leaves it there."""
    folder = home / "hub" / "models--mara--tiny"
    shutil.copytree(model, folder / "snapshots" / COMMIT)
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text(COMMIT)


@on(3)
def test_machines_with_nothing_get_the_data_from_one_and_the_model_from_another(
    launch, zygote, prepared, tmp_path
):
    """Real processes with a cache of the Hub of their own, and no way to it; with a secret."""
    model = save_model(tmp_path / "model", "qwen3", vocab_size=300)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(prepared / "tokenizer" / name, model / name)
    reference = finish(
        zygote, prepared, tmp_path / "undisturbed", 3, model_name=model, **SIZE, **LOADED
    )
    shutil.copytree(prepared, launch.at(2, "data"))
    cached(model, launch.at(1, "hf"))
    secret = launch.disk / "secret"
    logs = [tmp_path / f"{rank}.log" for rank in range(3)]
    for rank, host in enumerate(launch.machines):
        launch.at(rank, "secret").write_text("of these machines, and of no others")
        launch.at(rank, "secret").chmod(0o600)
        words = launch.words(rank, range(3), model_name=NAME, cluster_secret_file=secret, **LOADED)
        environ = {"HF_HOME": str(launch.disk / "hf"), "HF_HUB_OFFLINE": "1"}
        host.start(PYTHON, "train.py", *words, log=logs[rank], environ=environ)
    statuses = [status for host in launch.machines for status in host.wait()]
    assert statuses == [0] * 3, [read(log) for log in logs]
    for rank in (0, 1):
        assert same_data(prepared, launch.at(rank, "data"))
    said = [line for line in logs[0].read_text().splitlines() if " from rank " in line]
    assert [line.split()[0] for line in said] == ["model", "data"]
    found = loaded(launch.at(0, "run") / "model.safetensors")
    wanted = loaded(reference / "model.safetensors")
    assert found.keys() == wanted.keys() and all((found[k] == wanted[k]).all() for k in found)


@on(3, 100)
def test_a_fetch_that_is_killed_goes_on_also_with_another_main_machine(launch, large):
    shutil.copytree(large, launch.at(0, "data"))
    main, data = 0, launch.at(1, "data")
    for kill in range(5):
        pids = launch.start(main, 1)
        wait_until(lambda: launch.is_announced() and pieces_here(data), log=launch.log)
        launch.kill(pids)
        assert not (data / "manifest.json").exists(), "half a dataset is none"
        if kill == 2:
            launch.machines[0].disk.destroy()
            shutil.copytree(large, launch.at(2, "data"))
            main = 2
    came = pieces_here(data)
    assert launch.statuses(launch.start(main, 1)) == [0, 0], read(launch.log)
    assert 0 < launch.megabytes_announced() <= 80.2 - came * 4.19
    assert same_data(large, data)


@on(3, 100)
def test_when_a_source_is_lost_the_next_start_gets_the_rest_from_the_other(launch, large):
    for rank in (0, 2):
        shutil.copytree(large, launch.at(rank, "data"))
    pids = launch.start(0, 1, 2, peer_timeout=3)
    wait_until(lambda: pieces_here(launch.at(1, "data")) > 2, log=launch.log)
    os.kill(pids[2], 9)
    assert 0 not in launch.statuses(pids), read(launch.log)
    assert "lost a peer: rank 2" in launch.log.read_text()
    came = pieces_here(launch.at(1, "data"))
    assert launch.statuses(launch.start(0, 1)) == [0, 0], read(launch.log)
    assert 0 < launch.megabytes_announced() <= 80.2 - came * 4.19
    assert same_data(large, launch.at(1, "data"))


@on(2, None, 24)
def test_the_fix_of_too_small_a_disk_is_more_room(launch, large):
    """Which is said before the first byte, with both numbers."""
    shutil.copytree(large, launch.at(0, "data"))
    assert launch.statuses(launch.start(0, 1)) == [2, 2], read(launch.log)
    said = launch.log.read_text()
    assert "Traceback" not in said and "make room there" in said
    found = re.search(r"rank 1 \(.*: (\S+) bytes are yet to come, (\S+) are free there", said)
    needed, free = (int(number.replace(",", "")) for number in found.groups())
    assert needed > 80 * MB > 24 * 2**20 >= free
    assert not launch.at(1, "data").exists()
    backing = launch.machines[1].disk.backing
    subprocess.run(["mount", "-o", "remount,size=150m", backing], check=True)
    assert launch.statuses(launch.start(0, 1)) == [0, 0], read(launch.log)
    assert same_data(large, launch.at(1, "data"))
