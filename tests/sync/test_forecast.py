"""Forecasts are the sums one can do by hand; more network never makes a cluster slower."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from p2p_llm_forge.sync.forecast import (
    CANDIDATES,
    CPU_COSTS,
    Cost,
    Measured,
    Strategy,
    choose,
    forecast,
    table,
)
from tests import ROOT

FREE = {name: Cost(0.0, 0.0) for name in CPU_COSTS}
SLOW = Measured(
    parameters=13_800_000,
    update_s=0.6,
    tokens_per_update=1024,
    peers=2,
    bytes_per_s=50e6 / 8,
)
ON_GPU = replace(SLOW, is_on_cpu=False)
measurements = st.builds(
    Measured,
    parameters=st.integers(1, 10**10),
    update_s=st.floats(1e-3, 1e3),
    tokens_per_update=st.integers(1, 10**7),
    peers=st.integers(1, 64),
    bytes_per_s=st.floats(1e3, 1e11),
    latency_s=st.floats(0, 1),
    micro_batches=st.integers(1, 64),
    is_on_cpu=st.booleans(),
)
strategies = st.sampled_from(CANDIDATES)


def test_plain_ddp_over_50_mbit_per_second():
    # 13.8 M x 4 bytes to the other peer and back: 55.2 MB, 8.832 s, of which 0.4 s are hidden.
    found = forecast(Strategy(), ON_GPU)
    assert found.bytes_per_update == found.peak_bytes == 55_200_000
    assert found.communication_s_per_update == pytest.approx(8.432)
    assert found.tokens_per_s == pytest.approx(1024 / 9.032)
    assert found.utilisation == pytest.approx(0.6 / 9.032)
    assert found.times_alone == pytest.approx(1.2 / 9.032), "two peers are slower than one"


def test_a_cpu_that_computes_hides_nothing():
    found = forecast(Strategy(), SLOW)
    assert found.communication_s_per_update == pytest.approx(8.832)
    assert found.tokens_per_s == pytest.approx(1024 / 9.432)


def test_only_the_last_micro_batch_hides_an_exchange():
    found = forecast(Strategy(), replace(ON_GPU, micro_batches=4))
    assert found.communication_s_per_update == pytest.approx(8.832 - 0.1)


def test_on_a_fast_network_the_last_gradients_are_still_waited_for():
    found = forecast(Strategy(), replace(ON_GPU, bytes_per_s=1e9 / 8))
    last = 25 * 2**20 / 55_200_000
    assert found.communication_s_per_update == pytest.approx(last * 55.2 / 125)


def test_16_bits_halve_the_bytes():
    found = forecast(Strategy(compress="bf16"), SLOW, FREE)
    assert found.bytes_per_update == 27_600_000
    assert found.communication_s_per_update == pytest.approx(4.416)


def test_rounds_of_100_updates_in_int8_over_50_mbit_per_second():
    # 26,954 groups of 256 in each half, 258 bytes each, go out twice: 13.908 MB, 2.2253 s.
    found = forecast(Strategy("diloco", "int8", 100), SLOW, FREE)
    assert found.peak_bytes == 2 * 26_954 * 258 == 13_908_264
    assert found.bytes_per_update == pytest.approx(139_082.64)
    assert found.communication_s_per_update == pytest.approx(0.02225, rel=1e-3)
    assert found.times_alone == pytest.approx(2 * 0.6 / 0.62225, rel=1e-4)
    assert found.times_alone > 1.9 and found.utilisation > 0.95


def test_encoding_and_decoding_are_counted():
    # Each peer encodes all and half again, and decodes all twice.
    costs = {"int8": Cost(encode=10.0, decode=4.0)}
    free = forecast(Strategy(compress="int8"), SLOW, FREE)
    found = forecast(Strategy(compress="int8"), SLOW, costs)
    spent = found.communication_s_per_update - free.communication_s_per_update
    assert spent == pytest.approx(13.8e6 * (1.5 * 10 + 2 * 4) * 1e-9)


def test_latency_counts_twice_for_each_other_peer():
    near, far = (replace(SLOW, peers=5, latency_s=latency_s) for latency_s in (0.0, 0.05))
    spent = [
        forecast(Strategy(compress="int8"), one).communication_s_per_update for one in (near, far)
    ]
    assert spent[1] - spent[0] == pytest.approx(0.05 * 2 * 4)


def test_fragments_lower_the_peak_and_overlap_hides_what_is_left():
    whole = forecast(Strategy("diloco", "int8", 100), SLOW, FREE)
    parts = forecast(Strategy("diloco", "int8", 100, fragments=4), SLOW, FREE)
    assert parts.peak_bytes == pytest.approx(whole.peak_bytes / 4, rel=1e-3)
    assert parts.bytes_per_update == pytest.approx(whole.bytes_per_update, rel=1e-3)
    hidden = forecast(Strategy("diloco", "int8", 100, fragments=4, overlap_steps=1), SLOW, FREE)
    assert hidden.communication_s_per_update == 0, "0.56 s behind an update of 0.6 s"


def test_the_peers_of_the_first_measurement_are_predicted_within_a_quarter():
    # DDP over 100 Mbit/s: 340 tokens/s for two peers, 868 for one alone, 6.0 s an update.
    measured = replace(
        SLOW, update_s=1020 / 868, tokens_per_update=2040, bytes_per_s=100e6 / 8 * 0.956
    )
    assert forecast(Strategy(), measured).tokens_per_s == pytest.approx(340, rel=0.25)


@given(strategy=strategies, measured=measurements)
def test_every_forecast_makes_sense(strategy, measured):
    found = forecast(strategy, measured)
    assert 0 < found.utilisation <= 1
    assert found.times_alone == pytest.approx(measured.peers * found.utilisation)
    alone = measured.tokens_per_update / measured.peers / measured.update_s
    assert found.tokens_per_s == pytest.approx(found.times_alone * alone)
    assert found.communication_s_per_update >= 0
    assert found.bytes_per_update >= 0
    assert found.peak_bytes > 0 or measured.peers == 1
    if measured.peers == 1:
        assert found.bytes_per_update == found.communication_s_per_update == 0


@given(strategy=strategies, measured=measurements, factor=st.floats(1, 1000))
def test_a_better_network_is_never_slower(strategy, measured, factor):
    found = forecast(strategy, measured).tokens_per_s
    wider = replace(measured, bytes_per_s=measured.bytes_per_s * factor)
    nearer = replace(measured, latency_s=measured.latency_s / factor)
    assert forecast(strategy, wider).tokens_per_s >= found * (1 - 1e-12)
    assert forecast(strategy, nearer).tokens_per_s >= found * (1 - 1e-12)


@given(
    measured=measurements,
    compress=st.sampled_from(["none", "bf16", "int8", "int4"]),
    every=st.integers(1, 500),
    more=st.integers(1, 500),
)
def test_longer_rounds_and_more_overlap_are_never_slower(measured, compress, every, more):
    found = forecast(Strategy("diloco", compress, every), measured)
    longer = forecast(Strategy("diloco", compress, every + more), measured)
    assert longer.tokens_per_s >= found.tokens_per_s * (1 - 1e-12)
    assert longer.bytes_per_update <= found.bytes_per_update
    assert longer.peak_bytes == found.peak_bytes
    hidden = forecast(Strategy("diloco", compress, every, overlap_steps=more), measured)
    assert hidden.tokens_per_s >= found.tokens_per_s * (1 - 1e-12)


def test_no_candidate_sends_more_than_the_one_before():
    found = [forecast(strategy, SLOW) for strategy in CANDIDATES]
    assert found[0].strategy.flags == "--sync ddp --compress none"
    for before, after in zip(found, found[1:], strict=False):
        assert after.bytes_per_update < before.bytes_per_update * 1.001, after.strategy.flags


def test_the_most_exact_strategy_that_reaches_the_goal_is_chosen():
    found = [forecast(strategy, SLOW) for strategy in CANDIDATES]
    chosen = choose(found)
    assert chosen.utilisation >= 0.95
    assert all(one.utilisation < 0.95 for one in found[: found.index(chosen)])
    assert chosen.strategy.sync == "diloco"
    fast = [forecast(strategy, replace(SLOW, bytes_per_s=1e10)) for strategy in CANDIDATES]
    assert choose(fast) is fast[0], "nothing is given up where the network is fast"
    slow = [forecast(strategy, replace(SLOW, bytes_per_s=1e3)) for strategy in CANDIDATES]
    assert choose(slow).tokens_per_s == max(one.tokens_per_s for one in slow)
    assert choose(slow).utilisation < 0.95


def test_the_table_tells_what_to_type():
    found = [forecast(strategy, SLOW) for strategy in CANDIDATES]
    lines = table(found)
    assert len(lines) == 1 + len(CANDIDATES)
    assert " ".join(lines[1].split()) == "--sync ddp --compress none 55.20 55.2 109 0.13 6.4%"
    marked = [line for line in lines if line.endswith("<- chosen")]
    assert len(marked) == 1 and marked[0].startswith(choose(found).strategy.flags + " ")
    assert "--sync-every 100 --fragments 4 --overlap-steps 10" in lines[-1]
    ends = {line.index("%") for line in lines[1:]}
    assert len(ends) == 1, "columns are aligned"


def test_a_forecast_is_imported_without_torch():
    words = [sys.executable, "-X", "importtime", "-m", "p2p_llm_forge.sync.forecast"]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True)
    imported = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
    assert done.returncode == 0 and "p2p_llm_forge.sync" in imported
    assert "torch" not in imported
