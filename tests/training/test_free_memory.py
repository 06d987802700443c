"""What control groups leave is read as Linux lays them out, in containers and outside."""

from __future__ import annotations

import pytest

from p2p_llm_forge.training import free_memory
from p2p_llm_forge.training.free_memory import free_bytes, free_in_groups

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
    import torch

    groups = machine("0::/\n", {".": (2_000_000, 1_000_000, 0)})
    monkeypatch.setattr(free_memory, "free_in_groups", lambda: free_in_groups(groups))
    assert free_bytes(torch.device("cpu")) == 1_000_000
