"""What a session has used: of all ranks together, or by the worst of them."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from p2p_llm_forge.errors import ForgeError
from p2p_llm_forge.training import gauge as gauges
from p2p_llm_forge.training.gauge import Gauge, measured_flops, memory_peak, new_gauge
from tests.model.families import LLAMA, model_of

CPU = torch.device("cpu")


def cluster_with(*others, device=CPU):
    """A cluster in which further ranks say these numbers."""
    return SimpleNamespace(
        accelerator=SimpleNamespace(mixed_precision="no"),
        device=device,
        barrier=lambda: None,
        gather_numbers=lambda own: [own, *([one] for one in others)],
    )


def test_the_peak_is_that_of_all_ranks_together(monkeypatch):
    monkeypatch.setattr(gauges, "measured_flops", lambda dtype: 2e9)
    gauge = new_gauge(model_of("llama", **LLAMA), 16, cluster_with(3e9, 5e9), 0.0)
    assert gauge.peak_flops == 10e9
    assert "peak 10 GFLOP/s measured in float32" in gauge.in_words()
    assert gauge.mfu(1000.0) == 1000 * gauge.flops_per_token / 10e9


def test_one_rank_whose_peak_is_unknown_makes_it_unknown(monkeypatch):
    monkeypatch.setattr(gauges, "measured_flops", lambda dtype: 2e9)
    gauge = new_gauge(model_of("llama", **LLAMA), 16, cluster_with(0.0), 0.0)
    assert gauge.peak_flops is None and gauge.mfu(1000.0) is None
    assert gauge.in_words().endswith("no peak is known of one of them: MFU unknown")


def test_what_cannot_be_a_peak_is_refused(monkeypatch):
    monkeypatch.setattr(gauges, "measured_flops", lambda dtype: 2e9)
    with pytest.raises(ForgeError, match="rank 1 says that its FLOP/s are"):
        new_gauge(model_of("llama", **LLAMA), 16, cluster_with(-1.0), 0.0)


def test_a_line_has_the_time_of_this_session_and_the_time_that_is_left():
    now = [100.0]
    gauge = Gauge(90.0, flops_per_token=2e6, peak_flops=8e9, clock=lambda: now[0])
    gauge.start()
    now[0] += 30  # three updates
    figures = gauge.figures(done=3, left=7, tokens_per_second=1000.0)
    assert figures == {"mfu": 0.25, "seconds": 40.0, "seconds_left": 70.0}
    assert gauge.memory_peak == memory_peak(CPU)
    assert gauge.figures(done=3, left=0, tokens_per_second=1000.0)["seconds_left"] == 0


def test_the_memory_is_that_of_the_worst_rank():
    gauge = Gauge(0.0, None, None)
    assert gauge.agree_on_memory(cluster_with(8e12)) == 8 * 10**12
    own = gauge.agree_on_memory(cluster_with(7.0))
    assert own == pytest.approx(memory_peak(CPU), rel=0.1)


def test_memory_that_was_held_once_counts_after_it_is_free():
    import psutil

    held = torch.ones(2**26)  # 256 MiB
    least = psutil.Process().memory_info().rss
    del held
    assert memory_peak(CPU) >= 0.98 * least > 2**28  # the kernel counts pages in batches


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_cpu_multiplies_at_some_speed(dtype):
    assert 1e7 < measured_flops(dtype) < 1e14
