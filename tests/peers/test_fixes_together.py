"""Fixes of what peers find together are followed to the letter; then they find nothing to fix."""

from __future__ import annotations

import json
import os
import re
import resource
import shutil
import socket
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
import torch.distributed as dist

from p2p_llm_forge.config import TrainConfig
from p2p_llm_forge.errors import ForgeError
from p2p_llm_forge.peers import preflight, reach
from p2p_llm_forge.peers.addresses import OPEN
from p2p_llm_forge.peers.claims import Claim, check_rank
from p2p_llm_forge.peers.findings import FAILURE, FINE
from p2p_llm_forge.peers.join import differences
from p2p_llm_forge.peers.launch import Launch
from p2p_llm_forge.peers.liveness import Liveness
from p2p_llm_forge.peers.machine import versions
from p2p_llm_forge.peers.plausible import require_numbers
from p2p_llm_forge.peers.reach import SILENT, judge_tries, opened_door, readable, try_door
from p2p_llm_forge.peers.rendezvous import Endpoint, choose_endpoint, open_store, rendezvous
from p2p_llm_forge.peers.secret import read_secret
from p2p_llm_forge.peers.store import Store
from tests import ROOT
from tests.memory_channel import clusters, run_ranks
from tests.ports import free_port
from tests.runs import by_hand, flags

HOSTS = ["anna", "berta", "carla"]
SECRET = b"a long common secret"


def endpoints(count, timeout_s=30.0, port=None, **fields):
    port = port or free_port()
    return [
        Endpoint(
            **{"rank": rank, "world_size": count, "local_world_size": 1, "main_port": port},
            **{"main_address": "127.0.0.1", "serves_store": rank == 0, "own_address": None},
            **{"timeout_s": timeout_s, "secret": None, **fields},
        )
        for rank in range(count)
    ]


def problem_of(act, *of):
    with pytest.raises(ForgeError) as refused:
        act(*of)
    return refused.value.problems[0]


def refusal_of(endpoint):
    return problem_of(rendezvous, endpoint)


# --- who comes -----------------------------------------------------------------------------------


def claim(store, rank, world_size=3):
    return Claim(store, rank, world_size, "10.0.0.1:29500", token=f"{rank} of {world_size}")


def test_the_fixes_of_numbers_and_of_a_late_rank_bring_all_together():
    store = Store(dist.HashStore(), 0, timeout_s=60)
    claim(store, 0).take()
    other_size = problem_of(claim(store, 1, 2).take)
    assert other_size.fix.startswith("write the same number for all machines (num_machines")
    claim(store, 1, 3).take()
    claim(store, 2).take()
    claim(store, 0).all_came()
    late = problem_of(replace(claim(store, 2), token="another").take)
    assert late.fix.startswith("wait for its end, or stop it, then start all machines again")
    again = Store(dist.HashStore(), 0, timeout_s=60)  # of rank 0, which has ended and starts again
    for rank in range(3):
        claim(again, rank).take()
    assert problem_of(check_rank, 2, 2).fix.startswith("correct the number of this machine (mach")
    check_rank(1, 2)
    assert "or the number of all" in problem_of(check_rank, 2, 2).fix
    check_rank(2, 3)


def test_the_fixes_of_a_missing_rank_let_all_meet():
    first, second, third = endpoints(3, timeout_s=1.0)
    for problem in run_ranks([first, second], refusal_of):
        assert problem.fix.startswith("start machine 2 too, or see what it printed")
        assert problem.fix.endswith("--rendezvous-timeout waits longer")
    longer = [replace(one, timeout_s=60.0) for one in endpoints(3)]
    assert len(run_ranks(longer, rendezvous)) == 3


def test_the_fix_of_a_rank_that_falls_silent_is_to_start_all_again():
    first, second = endpoints(2, peer_timeout_s=3.0)

    def come_and_end(endpoint):
        store = open_store(endpoint)
        peers = Liveness(store, 1, 2, 60.0, phase="rendezvous").start()
        peers.stop()  # its machine is gone, and said nothing

    _, problem = run_ranks(
        [second, first], lambda one: come_and_end(one) if one is second else refusal_of(one)
    )
    assert problem.fix == (
        "see whether that machine runs and what it printed, then start all again"
    )
    assert len(run_ranks(endpoints(2), rendezvous)) == 2


def test_the_fix_of_a_main_process_that_ended_is_to_see_what_it_printed():
    """And to start it again, which the same ranks then find."""
    served = subprocess.Popen(
        [sys.executable, "-m", "tests.peers.store_server"], stdout=subprocess.PIPE, cwd=ROOT
    )
    assert served.stdout is not None
    port = int(served.stdout.readline())
    (second,) = [one for one in endpoints(2, port=port, peer_timeout_s=3.0) if one.rank == 1]

    def end(_):
        store = Store(dist.TCPStore("127.0.0.1", port, is_master=False), 0, timeout_s=60)
        while not store.check("forge/rendezvous/hello/1"):
            pass
        served.kill()
        served.wait()

    problem, _ = run_ranks([second, None], lambda one: refusal_of(one) if one else end(one))
    assert "lost" in problem.found and "see what" in problem.fix
    assert len(run_ranks(endpoints(2), rendezvous)) == 2


def test_the_fix_of_another_program_at_the_main_port_is_a_free_one():
    with subprocess.Popen(
        [sys.executable, "-m", "http.server", "0", "--bind", "127.0.0.1"],
        **{"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True},
        env={**os.environ, "PYTHONUNBUFFERED": "1"},
    ) as other:
        (port,) = map(int, re.findall(r"port (\d+)", other.stdout.readline()))
        second = endpoints(2, timeout_s=1.0, port=port)[1]
        problem = problem_of(open_store, second)
        assert "see on that machine which program has the port, and choose one that is" in (
            problem.fix
        )
        other.terminate()
    assert len(run_ranks(endpoints(2, port=free_port()), rendezvous)) == 2


def test_the_fix_of_a_secret_is_the_file_of_the_others(tmp_path):
    ours, theirs = tmp_path / "ours", tmp_path / "theirs"
    ours.write_bytes(SECRET)
    theirs.write_bytes(b"the secret of another run")
    for file in (ours, theirs):
        file.chmod(0o600)
    for third in (None, str(theirs)):
        secrets = [read_secret(str(ours))] * 2 + [read_secret(third)]
        ranks = [replace(one, secret=own) for one, own in zip(endpoints(3), secrets, strict=True)]
        for problem in run_ranks(ranks, refusal_of)[:2]:
            assert problem.found.startswith("rank 2 (")
            assert problem.fix.startswith(
                "copy the file of the others there and name it by --cluster-secret-file"
            )
    copied = shutil.copy2(ours, theirs)  # as `scp -p` does
    config = TrainConfig(cluster_secret_file=str(copied))
    launch = Launch(rank=2, world_size=3, local_world_size=3)
    third = choose_endpoint(config, launch, {})
    ranks = [replace(one, secret=third.secret) for one in endpoints(3)]
    assert len(run_ranks(ranks, rendezvous)) == 3


def test_the_fixes_of_torchruns_open_launch_let_it_begin():
    outward = {"world_size": 2, "is_elastic": True, "master_addr": "10.0.0.1"}
    launch = Launch(**outward, by_torchrun=True, gloo_interface="lo")
    problem = problem_of(choose_endpoint, TrainConfig(), launch, {})
    assert "or add --allow-unauthenticated" in problem.fix
    assert choose_endpoint(TrainConfig(allow_unauthenticated=True), launch, {})
    assert "`python launch/elastic.py --main ADDRESS --secret-file cluster.secret" in problem.fix
    assert choose_endpoint(TrainConfig(), replace(launch, by_torchrun=False), {})


def test_the_fix_of_an_address_that_two_machines_have_is_one_of_its_own(monkeypatch):
    monkeypatch.setattr(reach, "ANSWER_S", 0.3)

    def judged(state):
        hellos = [
            readable({"host": host, "address": address, "addresses": [address]})
            for host, address in (("anna", "127.0.0.2"), ("berta", "127.0.0.1"))
        ]
        # Their loopback stands for two machines of one network.
        hellos = [{**one, "address": one["address"].replace("127", "10")} for one in hellos]
        return judge_tries(hellos, [{"tries": {"1": [state, 0]}}, {"tries": {}}])

    with socket.create_server(("127.0.0.1", 0)) as other:  # of a machine with the same address
        state, _ = try_door("127.0.0.1", other.getsockname()[1])
    assert state == SILENT
    (found,) = judged(state)
    assert found.fix.startswith("give every machine an address of its own: on 10.0.0.1 another")
    with opened_door("127.0.0.2") as port:
        assert try_door("127.0.0.2", port) == (OPEN, 0) and judged(OPEN) == []


# --- what strangers send -------------------------------------------------------------------------


def test_the_fix_of_what_no_rank_sends_is_to_let_only_ranks_in():
    for stranger, secret in ((True, None), (True, SECRET), (False, SECRET)):
        shared = dist.HashStore()
        if stranger:  # writes before rank 1 does
            shared.set("forge/1/1", json.dumps({"evil": 1}))

        def act(cluster):
            if cluster.rank == 1:
                return None
            return cluster.gather_facts({"host": "anna"})

        with clusters(2, shared, secret) as ranks:
            if stranger:
                problem = problem_of(act, ranks[0])
                words = "let only the peers reach"
                assert words in problem.fix
                assert secret or "with --cluster-secret-file on all of them" in problem.fix
            else:
                facts = run_ranks(ranks, lambda one: one.gather_facts({"host": HOSTS[one.rank]}))
                assert [fact["host"] for fact in facts[0]] == HOSTS[:2]


def test_the_fix_of_numbers_that_cannot_be_is_the_same():
    problem = problem_of(require_numbers, "it trained on", [1, -1])
    assert problem.fix.startswith("start the same version of this program on all machines; if it")
    require_numbers("it trained on", [1, 1])


def test_the_fix_of_a_bug_of_the_main_process_is_what_that_printed():
    def act(cluster):
        if cluster.is_main:
            with pytest.raises(KeyError, match="no such key"):  # its traceback
                cluster.main_only(lambda: {}["no such key"])
            return None
        return problem_of(cluster.main_only, lambda: None)

    with clusters(2) as ranks:
        _, problem = run_ranks(ranks, act)
    assert (
        problem.fix.startswith("see what that process printed") and "no such key" in problem.found
    )
    with clusters(2) as ranks:
        assert run_ranks(ranks, lambda one: one.main_only(lambda: 1)) == [1, 1]


# --- what must be alike --------------------------------------------------------------------------


def test_the_fix_of_other_versions_installs_the_one_that_rank_0_has(tmp_path, monkeypatch):
    """pip installs, by the printed words, from a folder of packages that stands for PyPI."""
    own = {"precision": "no", "backend": "gloo", "settings": {}, "host": "anna"}
    first = {**own, **versions()}
    site, wheels = tmp_path / "site", tmp_path / "wheels"
    wheels.mkdir()
    for number, folder in (("1.11.0", site), (first["accelerate"], wheels)):
        meta = f"Metadata-Version: 2.1\nName: accelerate\nVersion: {number}\n"
        name = f"accelerate-{number}.dist-info"
        if folder is site:
            (site / name).mkdir(parents=True)
            (site / name / "METADATA").write_text(meta)
            continue
        with zipfile.ZipFile(wheels / f"accelerate-{number}-py3-none-any.whl", "w") as wheel:
            wheel.writestr(f"{name}/METADATA", meta)
            wheel.writestr(f"{name}/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
            wheel.writestr(f"{name}/RECORD", "")
    monkeypatch.syspath_prepend(str(site))
    (found,) = differences([first, {**own, **versions()}])
    (name, number) = re.findall(r"^install (\S+) (\S+) there", found.fix)[0]
    shutil.rmtree(site)
    done = subprocess.run(
        [sys.executable, "-m", "pip", "install", f"{name}=={number}"],
        env={
            **os.environ,
            **{"PIP_TARGET": str(site), "PIP_FIND_LINKS": str(wheels), "PIP_NO_INDEX": "1"},
            **{"PIP_NO_DEPS": "1", "PIP_DISABLE_PIP_VERSION_CHECK": "1"},
        },
        **{"capture_output": True, "text": True},
    )
    assert done.returncode == 0, done.stderr
    assert differences([first, {**own, **versions()}]) == []


def test_the_fixes_of_other_settings_make_them_alike():
    own = {"precision": "no", "backend": "gloo", "settings": {"seed": 0}, "host": "a", **versions()}
    for change, fix in (
        ({"precision": "bf16"}, "give the same --mixed-precision on all machines"),
        ({"backend": "nccl"}, "give --backend gloo on all machines"),
        ({"forge": "0.0.1"}, "take the same version of this program on all machines"),
        ({"settings": {"seed": 7}}, "start all machines with the same --seed"),
    ):
        (found,) = differences([own, {**own, **change}])
        assert fix in found.fix
        assert differences([{**own, **change}, {**own, **change}]) == []


class Pythons:
    """Stands for a cluster whose ranks run these versions of Python."""

    def __init__(self, *numbers):
        self.numbers = numbers

    def gather_facts(self, facts):
        return [{"python": number} for number in self.numbers]


def test_the_fix_of_another_python_names_the_one_to_use():
    found = preflight.judge_pythons(Pythons("3.12", "3.10"), HOSTS)[0]
    (number,) = re.findall(r"^use Python (\S+) there too", found.fix)
    assert preflight.judge_pythons(Pythons("3.12", number), HOSTS)[0].level == FINE


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to become another user")
def test_the_fixes_of_a_folder_that_cannot_be_written_let_it_be_written():
    def judged(path):
        os.seteuid(65534)
        try:
            with clusters(1) as (alone,):
                return preflight.judge_folders(alone, path, False, HOSTS)[0]
        finally:
            os.seteuid(0)

    with tempfile.TemporaryDirectory() as top:  # pytest's own folders are closed to other users
        os.chmod(top, 0o755)
        folder, another = Path(top, "locked"), Path(top, "open")
        for made, mode in ((folder, 0o755), (another, 0o777)):
            made.mkdir()
            made.chmod(mode)
        for path in (folder, folder / "run"):
            found = judged(path)
            assert found.level == FAILURE
            assert found.fix == "make it writable, or give another folder"
        folder.chmod(0o700)  # not even to be looked into
        assert judged(folder / "run").level == FAILURE
        assert judged(another).level == FINE
        folder.chmod(0o777)
        assert judged(folder).level == judged(folder / "run").level == FINE


# --- real launches -------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("faketime"), reason="needs `faketime` (package faketime)")
def test_the_fix_of_a_clock_sets_it_right(zygote, start, tmp_path):
    """libfaketime gives rank 1 another clock; without it, as the time service leaves it, all is
    well. The command itself needs systemd as the first process, and a time server."""
    log = tmp_path / "log"

    def meet(*faketime):
        together = [f"--{name}={value}" for name, value in by_hand(2).items()]
        words = [*together, "--rendezvous-timeout=120", "--peer-timeout=60"]
        log.unlink(missing_ok=True)
        first = zygote.start([*words, "--rank=0"], log, script="check_cluster")
        if faketime:
            second = start(*faketime, sys.executable, "check_cluster.py", *words, "--rank=1")
            printed, _ = second.communicate()
        else:
            zygote.start([*words, "--rank=1"], tmp_path / "second", script="check_cluster")
        return zygote.wait(first), log.read_text()

    status, printed = meet("faketime", "-m", "-f", "-90s")
    assert status == 3, printed
    found = re.search(
        r"WARNING +clock .* is (\d+)\.\d s behind that of rank 0\n +fix: (.*)", printed
    )
    assert found and 80 < int(found[1]) < 100, printed
    assert "sudo timedatectl set-ntp true" in found[2]
    if shutil.which("timedatectl"):
        known = subprocess.run(["timedatectl", "--help"], capture_output=True, text=True).stdout
        assert "set-ntp BOOL" in known
    status, printed = meet()
    assert re.search(r"ok +clock", printed) and "WARNING  clock" not in printed, printed


@pytest.mark.slow
def test_the_fixes_of_too_little_memory_need_less(zygote, prepared, tmp_path):
    def checked(*more):
        log = tmp_path / "log"
        log.unlink(missing_ok=True)
        large = {"batch_size": 2048, "micro_batch_size": 2048, "resume": None, "max_steps": None}
        large["config_overrides"] = "n_layer=2,n_head=2,n_embd=256"
        words = flags(prepared, tmp_path / "run", **large)
        pid = zygote.start([*words, *more], log, script="check_cluster")
        limit = psutil.Process(pid).memory_info().vms + 1100 * 2**20
        resource.prlimit(pid, resource.RLIMIT_AS, (limit, limit))
        return zygote.wait(pid), log.read_text()

    status, printed = checked()
    assert status == 1 and "out of memory" in printed, printed
    assert "fix: lower --micro-batch-size (the batch stays the same), or add" in printed
    status, printed = checked("--micro-batch-size=8")
    assert status == 0, printed
