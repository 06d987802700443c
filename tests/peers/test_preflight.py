"""What the peers find together: clocks, versions, and a folder that all of them see."""

from __future__ import annotations

import time

from p2p_llm_forge.config import CheckConfig
from p2p_llm_forge.peers import preflight
from p2p_llm_forge.peers.findings import fine, warning
from p2p_llm_forge.peers.launch import Launch
from p2p_llm_forge.peers.launch_files import LaunchFile
from p2p_llm_forge.peers.routes import Main
from tests.memory_channel import clusters, run_ranks

HOSTS = ["anna", "berta", "carla"]


class Clocks:
    """Stands for a cluster whose ranks' clocks are so many seconds off."""

    def __init__(self, *offsets):
        self.offsets = offsets

    def gather_numbers(self, values):
        return [[time.time() + offset] for offset in self.offsets]


def test_a_clock_that_is_off_is_named():
    (finding,) = preflight.judge_clocks(Clocks(0, 0.2, -90), HOSTS)
    assert finding.level == "warning" and "rank 2 (carla) is 90.0 s behind" in finding.found
    (finding,) = preflight.judge_clocks(Clocks(0, 0.2), HOSTS)
    assert finding.level == "fine" and "0.2" in finding.found


class Pythons:
    """Stands for a cluster whose ranks run these versions of Python."""

    def __init__(self, *versions):
        self.versions = versions

    def gather_facts(self, facts):
        return [{"python": version} for version in self.versions]


def test_a_rank_with_another_python_is_named():
    (finding,) = preflight.judge_pythons(Pythons("3.12", "3.10", "3.12"), HOSTS)
    assert finding.level == "warning"
    assert finding.found == "rank 1 (berta) has Python 3.10, rank 0 has 3.12"
    (finding,) = preflight.judge_pythons(Pythons("3.12", "3.12"), HOSTS)
    assert finding.level == "fine"


def judged(paths, keeps_own_state=False):
    """What ranks with these folders find of them."""

    def act(cluster):
        return preflight.judge_folders(cluster, paths[cluster.rank], keeps_own_state, HOSTS)

    with clusters(len(paths)) as ranks:
        (found,) = {finding for (finding,) in run_ranks(ranks, act)}
    return found


def test_a_folder_that_all_see_is_fine_and_left_as_it_was(tmp_path):
    finding = judged([tmp_path / "new" / "run"] * 2)
    assert finding.level == "fine" and "is seen by all ranks" in finding.found
    assert list(tmp_path.iterdir()) == []


def test_a_folder_of_its_own_is_fine_too_and_what_travels_is_said(tmp_path):
    paths = [tmp_path / "here", tmp_path / "elsewhere", tmp_path / "here"]
    finding = judged(paths)
    assert finding.level == "fine"
    assert finding.found == (
        "rank 1 (berta) has another --output-dir than rank 0: checkpoints travel there to resume"
    )
    finding = judged([*paths[:2], tmp_path / "third"], keeps_own_state=True)
    assert finding.found.startswith("rank 1 (berta), rank 2 (carla) have another --output-dir")
    assert finding.found.endswith("and to rank 0 what only other ranks have of one")
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_written_is_a_failure_of_its_rank(tmp_path):
    (tmp_path / "file").write_text("in the way")
    finding = judged([tmp_path / "run", tmp_path / "file"])
    assert finding.level == "failure" and "cannot be written" in finding.found
    assert finding.where.startswith("rank 1 (") and "give another folder" in finding.fix


def test_findings_of_all_ranks_carry_their_names():
    def act(cluster):
        own = [warning("a", f"of {cluster.rank}", "fix: it")] if cluster.rank else [fine("a", "ok")]
        return preflight.gather_findings(cluster, own, HOSTS[:2])

    with clusters(2) as ranks:
        first, second = run_ranks(ranks, act)
    assert first == second
    assert [(f.found, f.fix, f.where) for f in first] == [
        ("ok", "", "rank 0 (anna)"),
        ("of 1", "fix: it", "rank 1 (berta)"),
    ]


def test_a_launch_must_be_the_one_that_its_file_promises(monkeypatch):
    monkeypatch.setattr(preflight, "judge_machine", lambda *_: [])
    file = LaunchFile("my.yaml", {"num_processes": 4, "num_machines": 2})

    def judged(world_size, **flags):
        launch = Launch(world_size=world_size, local_world_size=world_size)
        found = preflight.judge_alone(CheckConfig(**flags), launch, file)
        return [finding.found for finding in found if finding.level == "failure"]

    assert judged(2) == ["2 processes were started, my.yaml promises 4"]
    assert judged(4) == judged(1) == judged(2, meet=True) == []


def test_one_process_speaks_for_its_machine():
    launch = Launch(world_size=2, local_world_size=2, rank=1, local_rank=1)
    assert preflight.judge_alone(CheckConfig(), launch, None) == []


def test_the_main_address_is_that_of_the_launch_or_else_of_the_file(monkeypatch):
    seen = []
    monkeypatch.setattr(preflight, "judge_machine", lambda *_: [])
    monkeypatch.setattr(preflight, "judge_route", lambda main, *_: seen.append(main) or [])
    keys = {"num_machines": 2, "num_processes": 2, "machine_rank": 1, "main_process_port": 1234}
    file = LaunchFile("my.yaml", {**keys, "main_process_ip": "10.0.0.1"})
    preflight.judge_alone(CheckConfig(), Launch(), file)
    by_hand = Launch(rank=1, world_size=2, master_addr="10.0.0.9", master_port=99)
    preflight.judge_alone(CheckConfig(meet=True), by_hand, file)
    preflight.judge_alone(CheckConfig(), Launch(), None)
    assert seen == [
        Main("10.0.0.1", 1234, 2, is_here=False, will_be_waited_for=False),
        Main("10.0.0.9", 99, 2, is_here=False, will_be_waited_for=True),
    ]
