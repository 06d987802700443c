"""Gradients averaged between threads, against float64; and those on their way at the end."""

from __future__ import annotations

import contextlib
import json
import threading
from collections.abc import Callable
from concurrent.futures import CancelledError
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate import DistributedDataParallelKwargs

from p2p_llm_forge.config import TrainConfig
from p2p_llm_forge.peers.channel import Channel
from p2p_llm_forge.polling import wait_for
from p2p_llm_forge.sync.base import SavedSync
from p2p_llm_forge.sync.compress import CODECS
from p2p_llm_forge.sync.ddp import (
    BUCKET_MB,
    COMPRESSED_BUCKET_MB,
    LEAST_BUCKET_MB,
    GradientAveraging,
    bucket_mb,
    settle_ddp,
    share_first_weights,
)
from tests.memory_channel import clusters, run_ranks
from tests.sync.ranks import LikeDDP, Model

LOSSY = [name for name, codec in CODECS.items() if codec.is_lossy]
# How far a mean of two or three may be off, of the largest value: two encodings.
BOUNDS = {"none": 1e-6, "bf16": 2 * 2**-8, "int8": 2 / 127, "int4": 2 / 7}


def gradients_of(rank: int, step: int) -> list[torch.Tensor]:
    """What backward leaves for each parameter of the model."""
    numbers = torch.Generator().manual_seed(1000 * rank + step)
    return [torch.randn(p.shape, generator=numbers) for p in Model().parameters()]


def mean_of(ranks: int, step: int) -> torch.Tensor:
    """The mean of all ranks' gradients in float64, flat."""
    flat = [flattened(gradients_of(rank, step)) for rank in range(ranks)]
    return torch.stack(flat).mean(0)


def flattened(tensors: list[torch.Tensor]) -> torch.Tensor:
    return torch.cat([tensor.flatten().double() for tensor in tensors])


def on_ranks(
    ranks: int, compress: str, act: Callable[[GradientAveraging, LikeDDP, int], Any]
) -> list:
    """What `act` returns on each rank."""

    def on_one(cluster: Any) -> Any:
        model = LikeDDP(Model())
        return act(GradientAveraging(cluster, model, CODECS[compress]), model, cluster.rank)

    with clusters(ranks) as world:
        return run_ranks(world, on_one)


@pytest.mark.parametrize("ranks", [2, 3])
@pytest.mark.parametrize("compress", CODECS)
def test_all_ranks_get_the_same_bits_near_the_mean_of_their_gradients(compress, ranks):
    found = on_ranks(
        ranks, compress, lambda sync, model, rank: flattened(model.backward(gradients_of(rank, 0)))
    )
    assert all(torch.equal(one, found[0]) for one in found)
    off = (found[0] - mean_of(ranks, 0)).abs().max()
    assert off < BOUNDS[compress] * 4, "of values up to 4"
    if compress in LOSSY:
        assert off > 1e-5, "it was compressed"


@pytest.mark.parametrize("compress", LOSSY)
def test_gradients_and_residuals_add_up_to_all_that_was_given(compress):
    def train(sync, model, rank):
        averaged = sum(flattened(model.backward(gradients_of(rank, step))) for step in range(9))
        own = sync.state().own
        names = [name for name, _ in Model().named_parameters()]
        residuals = [
            sum(own[f"{kind}.{name}"] for kind in ("residual_of_sending", "residual_of_sum"))
            for name in names
        ]
        return averaged, flattened(residuals)

    found = on_ranks(3, compress, train)
    arrived = found[0][0] + sum(residuals for _, residuals in found)
    expected = sum(mean_of(3, step) for step in range(9))
    torch.testing.assert_close(arrived, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("compress", LOSSY)
@pytest.mark.parametrize("spoiled", [torch.inf, torch.nan])
def test_a_gradient_that_is_not_finite_leaves_nothing_in_the_next_updates(compress, spoiled):
    """As when loss scaling skips an update."""

    def train(sync, model, rank):
        found = []
        for step in range(6):
            gradients = gradients_of(rank, step)
            if (rank, step) == (1, 3):
                gradients[0].view(-1)[0] = spoiled
            found.append(flattened(model.backward(gradients)))
        return found

    for found in on_ranks(2, compress, train):
        assert [bool(one.isfinite().all()) for one in found] == [step != 3 for step in range(6)]
        assert (found[5] - mean_of(2, 5)).abs().max() < 8 * BOUNDS[compress]


@pytest.mark.parametrize("compress", LOSSY)
@pytest.mark.parametrize("ranks", [2, 3])
def test_a_resumed_run_sends_what_the_one_before_had_dropped(compress, ranks):
    """As many ranks come to the same bits; others still send all of it."""

    def calm(sync, model, rank):
        for step in range(3):
            model.backward(gradients_of(rank, step))
        state = sync.state()
        facts = json.loads(json.dumps({**state.facts, "settings": sync.settings()}))
        return state.own, facts, flattened(model.backward(gradients_of(rank, 3)))

    before = on_ranks(2, compress, calm)
    saved = SavedSync(before[0][1], {}, lambda rank: before[rank][0])

    def resume(sync, model, rank):
        sync.load_state(saved)
        return flattened(model.backward(gradients_of(rank, 3)))

    found = on_ranks(ranks, compress, resume)
    if ranks == 2:
        assert all(torch.equal(one, before[0][2]) for one in found)
        return
    without = on_ranks(
        ranks, compress, lambda sync, model, rank: flattened(model.backward(gradients_of(rank, 3)))
    )
    dropped = sum(
        flattened([own[f"{kind}.{name}"] for name, _ in Model().named_parameters()])
        for own, _, _ in before
        for kind in ("residual_of_sending", "residual_of_sum")
    )
    # What arrives beyond that is what was dropped, as far as the codec is exact.
    off = (found[0] - without[0] - dropped).abs().max()
    assert 0 < off < 8 * BOUNDS[compress] and dropped.abs().max() > 0


def test_a_backward_for_priming_exchanges_nothing():
    def prime(sync, model, rank):
        with sync.priming():
            kept = flattened(model.backward(gradients_of(rank, 0)))
        silent = sync.after_update(0, 1).bytes_sent
        model.backward(gradients_of(rank, 0))
        sync.after_update(1, 1)  # the ranks have compared their buckets, too
        model.backward(gradients_of(rank, 0))
        return kept, silent, sync.after_update(2, 1)

    for rank, (kept, silent, report) in enumerate(on_ranks(3, "none", prime)):
        assert torch.equal(kept, flattened(gradients_of(rank, 0))) and silent == 0
        values = sum(-(-p.numel() // 3) * 3 for p in Model().parameters())  # as many for each rank
        assert report.bytes_sent == 2 * 2 / 3 * 4 * values
        assert report.seconds >= 0


def test_only_the_last_micro_batch_of_an_update_exchanges():
    def contexts(sync, model, rank):
        no_sync = contextlib.nullcontext("no_sync")
        sync._cluster.accelerator = SimpleNamespace(no_sync=lambda _: no_sync)
        return sync.context(False) is no_sync, sync.context(True) is no_sync

    assert on_ranks(2, "none", contexts) == [(True, False)] * 2


def test_losses_are_scaled_so_that_the_mean_over_ranks_is_that_over_all_tokens():
    assert on_ranks(4, "none", lambda sync, *_: sync.loss_scale(10, 80)) == [4 / 80] * 4


def test_every_update_is_a_sync_point_after_which_all_agree():
    def look(sync, *_):
        return sync.is_sync_point(3), SavedSync(sync.state().facts, {}, lambda rank: {}).is_agreed

    assert on_ranks(2, "int8", look) == [(True, True)] * 2


@pytest.mark.parametrize(
    ("settings", "is_on_gloo", "expected"),
    [
        ({}, True, BUCKET_MB),
        ({"compress": "int8"}, True, COMPRESSED_BUCKET_MB),
        ({"compress": "int8"}, False, BUCKET_MB),
        ({"compress": "powersgd"}, True, BUCKET_MB),
        ({"sync": "diloco", "compress": "int8"}, True, BUCKET_MB),
    ],
)
def test_buckets_are_small_where_exchanges_overlap(settings, is_on_gloo, expected):
    accelerator = SimpleNamespace(ddp_handler=DistributedDataParallelKwargs())
    cluster = SimpleNamespace(
        is_on_gloo=is_on_gloo, accelerator=accelerator, world_size=2, own_group=lambda: "own"
    )
    settle_ddp(TrainConfig("data", "run", **settings), cluster, torch.nn.Linear(2, 2))
    arguments = accelerator.ddp_handler.to_kwargs()
    assert arguments.get("bucket_cap_mb", 25) == expected  # Accelerate leaves out its defaults
    assert arguments.get("process_group") == ("own" if is_on_gloo else None)


@pytest.mark.parametrize(
    ("trained", "compress", "expected"),
    [
        (2**10, "none", LEAST_BUCKET_MB),
        (2**21, "none", 1.0),  # 8 MB in eight
        (2**21, "int8", 1.0),
        (2**27, "none", BUCKET_MB),
        (2**27, "int8", COMPRESSED_BUCKET_MB),
    ],
)
def test_buckets_of_adapters_leave_while_backward_runs(trained, compress, expected):
    with torch.device("meta"):
        model = torch.nn.ParameterList([torch.zeros(trained), torch.zeros(2**30)])
    model[1].requires_grad_(False)
    cluster = SimpleNamespace(is_on_gloo=True)
    config = TrainConfig("data", "run", model_name="base", lora_rank=16, compress=compress)
    assert bucket_mb(config, cluster, model) == expected


def test_a_bucket_that_waits_when_the_run_ends_is_reported_to_ddp_and_not_to_the_user(caplog):
    """As when a peer is lost: one exchange hangs until its timeout, the next never begins."""
    begun, gate = threading.Event(), threading.Event()

    class Hanging(GradientAveraging):
        def __init__(self):
            self._channel, self.is_priming = Channel(0, 1), False

        def _exchange_of(self, bucket):
            return begun.set, lambda _: gate.wait(60) and bucket.buffer()

    sync, bucket = Hanging(), SimpleNamespace(buffer=lambda: torch.zeros(3))
    first, second = (sync._exchange(bucket) for _ in range(2))
    assert begun.wait(60)
    closing = threading.Thread(target=sync._channel.close)
    closing.start()
    try:
        assert wait_for(second.done, timeout_s=60)
    finally:
        gate.set()
        closing.join()
    with pytest.raises(CancelledError):
        second.wait()
    assert first.wait().tolist() == [0, 0, 0]
    assert not caplog.records


def test_only_what_is_trained_is_sent_before_the_first_update():
    sent = []
    cluster = SimpleNamespace(is_on_gloo=True, world_size=2, send_from_main_=sent.append)
    model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.BatchNorm1d(2))
    model[0].weight.requires_grad_(False)
    share_first_weights(cluster, model)
    trained = {"0.bias", "1.weight", "1.bias"}
    assert {*sent[0]} == trained | {name for name, _ in model.named_buffers()}
    # By NCCL, DDP sends: all but what it is to leave out.
    share_first_weights(SimpleNamespace(is_on_gloo=False, world_size=2), model)
    assert model._ddp_params_and_buffers_to_ignore == ["0.weight"] and len(sent) == 1
