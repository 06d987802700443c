"""What control groups leave is read as Linux lays them out, in containers and outside."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from p2p_llm_forge import limits
from p2p_llm_forge.limits import cores, free_in_groups, free_memory, shares_of_groups

GB = 10**9
NO_LIMIT = 9223372036854771712  # of version 1
# What version 2 and version 1 call the same.
UNIFIED = ("memory.max", "memory.current", "inactive_file")
OLDER = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")


@pytest.fixture
def machine(tmp_path):
    """Lays out a machine: what /proc/self/cgroup holds, and groups by their folders."""

    def made(own, groups, names=UNIFIED):
        most_name, used_name, cache_name = names
        (tmp_path / "proc/self").mkdir(parents=True)
        (tmp_path / "proc/self/cgroup").write_text(own)
        for folder, (most, used, cache) in groups.items():
            group = tmp_path / "sys/fs/cgroup" / folder
            group.mkdir(parents=True, exist_ok=True)
            (group / most_name).write_text(f"{most}\n")
            (group / used_name).write_text(f"{used}\n")
            lines = ["anon 5", "active_file 7", "inactive_file 1", "total_cache 9"]
            lines = [line for line in lines if line.split()[0] != cache_name]
            (group / "memory.stat").write_text("\n".join([*lines, f"{cache_name} {cache}", ""]))
        return tmp_path

    return made


def test_page_cache_that_the_kernel_gives_up_is_free(machine):
    """A container that has just prepared a corpus: nearly all that it uses is files."""
    there = machine("0::/\n", {".": (4 * GB, 39 * GB // 10, 3 * GB)})
    assert free_in_groups(there) == [4 * GB - 9 * GB // 10]


def test_the_limits_of_all_groups_around_a_process_count(machine):
    """As Slurm and systemd set them, without a container; the root of a machine has no files."""
    job = "system.slice/slurmstepd.scope/job_7"
    there = machine(
        f"0::/{job}/step_0/user/task_0\n",
        {
            f"{job}/step_0/user/task_0": ("max", 1 * GB, 0),
            f"{job}/step_0": (6 * GB, 2 * GB, 0),
            job: (3 * GB, 2 * GB, 0),
            "system.slice": ("max", 9 * GB, 0),
            "another.slice": (1, 1, 0),
        },
    )
    assert sorted(free_in_groups(there)) == [1 * GB, 4 * GB]


def test_version_1_is_read(machine):
    own = "5:cpuset:/x\n4:cpu,memory:/slurm/job_7\n1:name=systemd:/memory\n0::/\n"
    there = machine(
        own,
        {
            "memory/slurm/job_7": (NO_LIMIT, 3 * GB, 0),
            "memory/slurm": (8 * GB, 3 * GB, 1 * GB),
            "memory": (NO_LIMIT, 9 * GB, 0),
        },
        OLDER,
    )
    assert min(free_in_groups(there)) == 6 * GB


@pytest.mark.parametrize("own", ["4:memory:/docker/1a2b\n", "4:memory:/../elsewhere\n"])
def test_a_container_whose_path_is_the_machines_is_read_at_the_root(machine, own):
    assert free_in_groups(machine(own, {"memory": (4 * GB, 1 * GB, 0)}, OLDER)) == [3 * GB]


def test_groups_that_say_nothing_limit_nothing(machine, tmp_path):
    assert free_in_groups(tmp_path) == []  # no Linux
    assert free_in_groups(machine("0::/a\n", {"a": ("max", 1, 0), ".": ("", "", 0)})) == []


def test_without_its_statistics_all_that_a_group_uses_counts(machine):
    there = machine("0::/\n", {".": (4 * GB, 1 * GB, GB)})
    (there / "sys/fs/cgroup/memory.stat").unlink()
    assert free_in_groups(there) == [3 * GB]


def test_the_least_that_is_left_is_what_is_free(monkeypatch, machine):
    groups = machine("0::/\n", {".": (2_000_000, 1_000_000, 0)})
    monkeypatch.setattr(limits, "free_in_groups", lambda: free_in_groups(groups))
    assert free_memory() == 1_000_000


def test_shares_of_time_are_read_of_all_groups(machine):
    there = machine("0::/pod/box\n", {"pod/box": ("max", 1, 0), "pod": ("max", 1, 0)})
    groups = there / "sys/fs/cgroup"
    (groups / "pod/box/cpu.max").write_text("max 100000\n")
    (groups / "pod/cpu.max").write_text("150000 100000\n")
    assert shares_of_groups(there) == [1.5]


@pytest.mark.parametrize("folder", ["cpu", "cpu,cpuacct", "cpu,cpuacct/docker/1a2b"])
def test_shares_of_time_of_version_1_are_read(machine, folder):
    """A folder is named by one of its controllers or by all; in a container only the root is."""
    there = machine("2:cpu,cpuacct:/docker/1a2b\n1:memory:/\n", {folder: ("", "", 0)})
    group = there / "sys/fs/cgroup" / folder
    (group / "cpu.cfs_period_us").write_text("50000\n")
    (group / "cpu.cfs_quota_us").write_text("-1\n")
    assert shares_of_groups(there) == []
    (group / "cpu.cfs_quota_us").write_text("150000\n")
    assert shares_of_groups(there) == [3]


@pytest.mark.parametrize(("shares", "expected"), [([], 4), ([8], 4), ([3, 1.5], 2), ([0.1], 1)])
def test_cores_are_those_that_all_limits_leave(monkeypatch, shares, expected):
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: range(4), raising=False)
    monkeypatch.setattr(limits, "shares_of_groups", lambda: shares)
    assert cores() == expected


@pytest.fixture
def group():
    """Makes a control group of this machine with limits, as a container has, and removes it."""
    made = []

    def make(controller, limits):
        mounted = Path("/sys/fs/cgroup")
        older = (mounted / controller).is_dir()
        folder = (mounted / controller if older else mounted) / f"forge-test-{os.getpid()}"
        try:
            if folder not in made:
                folder.mkdir()
                made.append(folder)
            for name, limit in limits[0 if older else 1].items():
                (folder / name).write_text(limit)
        except OSError as error:
            pytest.skip(f"no control group of {controller} can be made here: {error}")
        return folder

    yield make
    for folder in made:
        folder.rmdir()


def test_a_process_in_a_group_of_this_machine_sees_its_limits(group):
    memory = ({"memory.limit_in_bytes": "500000000"}, {"memory.max": "500000000"})
    cpu = ({"cpu.cfs_quota_us": "100000"}, {"cpu.max": "100000 100000"})
    folders = [group("memory", memory), group("cpu", cpu)]
    enter = "".join(
        f"open({str(folder)!r} + '/cgroup.procs', 'w').write('0');" for folder in folders
    )
    words = f"{enter} from p2p_llm_forge.limits import *; print(cores(), int(free_memory()))"
    done = subprocess.run([sys.executable, "-c", words], capture_output=True, text=True, check=True)
    assert done.stdout.split()[0] == "1"
    assert 300e6 < int(done.stdout.split()[1]) < 500e6
