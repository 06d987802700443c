"""A machine that is short of something is warned of, before the run begins."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from p2p_llm_forge.config import TrainConfig
from p2p_llm_forge.peers import machine
from p2p_llm_forge.peers.launch import Launch

GB = 10**9


def free(monkeypatch, disk=100 * GB, memory=100 * GB, cores=4):
    import psutil

    monkeypatch.setattr(machine.shutil, "disk_usage", lambda _: SimpleNamespace(free=disk))
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=memory))
    monkeypatch.setattr(machine, "cores", lambda: cores)


def levels(config=None, launch=None):
    found = machine.judge_machine(config or TrainConfig(cpu_threads=2), launch or Launch())
    return {finding.topic: finding.level for finding in found}


def test_a_machine_with_room_is_fine(monkeypatch):
    free(monkeypatch)
    expected = dict.fromkeys(("disk", "memory", "threads", "versions"), "fine")
    assert levels() == expected


def test_what_is_short_is_a_warning(monkeypatch):
    free(monkeypatch, disk=GB, memory=GB // 2)
    assert levels() == {
        **{"disk": "warning", "memory": "warning"},
        **{"threads": "fine", "versions": "fine"},
    }


def test_more_threads_than_cores_are_a_warning_with_the_number_that_fits(monkeypatch):
    free(monkeypatch, cores=4)
    launch = Launch(world_size=2, local_world_size=2)
    found = machine.judge_machine(TrainConfig(cpu_threads=3), launch)
    (warned,) = [finding for finding in found if finding.level == "warning"]
    assert "2 process(es) of 3 thread(s) on 4 core(s)" in warned.found
    assert "--cpu-threads 2" in warned.fix
    assert levels(TrainConfig(cpu_threads=2), launch)["threads"] == "fine"


@pytest.mark.parametrize(
    ("disk", "level"),
    # A checkpoint of 100 M parameters: 1.2 GB; two kept, one being written, and a model of 0.4 GB.
    [(4.1 * GB, "fine"), (3.9 * GB, "warning"), (1.1 * GB, "failure")],
)
def test_checkpoints_must_fit_on_the_disk(monkeypatch, tmp_path, disk, level):
    free(monkeypatch, disk=disk)
    config = TrainConfig(output_dir=str(tmp_path / "not" / "there"), keep_checkpoints=2)
    assert machine.judge_checkpoints(config, 100_000_000).level == level


def test_versions_are_those_of_the_imported_libraries():
    import accelerate
    import transformers

    found = machine.versions()
    assert found["torch"] == torch.__version__.split("+")[0]
    assert (found["transformers"], found["accelerate"]) == (
        transformers.__version__,
        accelerate.__version__,
    )


@pytest.mark.parametrize(
    ("float32_s", "bf16_s", "pays"),
    [
        ([0.010], [0.005], True),  # units for it
        ([0.010], [0.030], False),  # none: they are emulated
        ([0.010], [0.009], False),  # what is gained goes into conversions
        ([0.010, 0.050, 0.010], [0.050, 0.005, 0.050], True),  # others use the machine
    ],
)
def test_bf16_is_chosen_by_the_time_that_products_take(monkeypatch, float32_s, bf16_s, pays):
    clock, taken = [0.0], {torch.float32: 0, torch.bfloat16: 0}
    spent = {torch.float32: float32_s, torch.bfloat16: bf16_s}
    product = torch.Tensor.__matmul__

    def timed(one, other):
        times = spent[one.dtype]
        clock[0] += times[taken[one.dtype] % len(times)]
        taken[one.dtype] += 1
        return product(one, other)

    monkeypatch.setattr(torch.Tensor, "__matmul__", timed)
    monkeypatch.setattr(machine.time, "perf_counter", lambda: clock[0])
    assert machine.bf16_pays(torch.device("cpu")) is pays
    assert min(taken.values()) >= 3
    assert machine.bf16_pays(torch.device("meta")) is False
