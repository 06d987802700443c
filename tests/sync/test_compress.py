"""Codecs keep what they promise, against float64; error feedback loses nothing."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from p2p_llm_forge.sync.compress import CODECS, LEAST_SCALE, TILE, Codec, ErrorFeedback

LARGEST = float(np.finfo(np.float32).max)
LARGEST_BF16 = float(torch.finfo(torch.bfloat16).max)
by_name = pytest.mark.parametrize("codec", CODECS.values(), ids=CODECS)
lossy = pytest.mark.parametrize(
    "codec", [codec for codec in CODECS.values() if codec.is_lossy], ids=list(CODECS)[1:]
)


def allowed(codec: Codec, values: np.ndarray) -> np.ndarray:
    """How far each value may be off, in float64, from the formats' definitions alone."""
    exact = values.astype(np.float64)
    if codec.name == "none":
        return np.zeros_like(exact)
    if codec.name == "bf16":  # 8 significant bits; below the normal range steps of 2**-133
        return np.maximum(np.abs(exact) * 2.0**-8, 2.0**-134)
    steps = {"int8": 127, "int4": 7.47}[codec.name]
    groups = exact.reshape(*exact.shape[:-1], -1, codec.group)
    scale = np.maximum(np.abs(groups).max(axis=-1, keepdims=True) / steps, LEAST_SCALE)
    # Half a step; the scale is rounded to 8 significant bits, the quotient to float32's 24.
    half = scale * (1 + 2.0**-8) * (0.5 + steps * 2.0**-22)
    return np.broadcast_to(half, groups.shape).reshape(exact.shape)


def assert_close(codec: Codec, values: torch.Tensor) -> None:
    wire = codec.encode(values)
    assert wire.dtype == torch.uint8
    assert wire.shape == (*values.shape[:-1], codec.wire_bytes(values.shape[-1]))
    decoded = codec.decode(wire)
    assert decoded.dtype == torch.float32 and decoded.shape == values.shape
    off = np.abs(decoded.numpy().astype(np.float64) - values.numpy().astype(np.float64))
    assert (off <= allowed(codec, values.numpy())).all()


def random_values(shape: tuple[int, ...], seed: int = 0, spread: float = 3.0) -> torch.Tensor:
    """Normal values times powers of ten that differ from one to the next."""
    numbers = np.random.default_rng(seed)
    values = numbers.standard_normal(shape) * 10.0 ** numbers.uniform(-spread, spread, shape)
    return torch.from_numpy(values.astype(np.float32))


# Magnitudes of all sizes, whole groups of which are drawn at once.
anything = st.floats(-LARGEST_BF16, LARGEST_BF16, width=32)
similar = st.floats(-1.0, 1.0, width=32)


@by_name
@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_every_value_is_within_its_bound(codec, data):
    rows, groups = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 3))
    magnitude = data.draw(st.sampled_from([1.0, 1e-45, 1e-38, 1e-20, 1e-4, 1e10, 3e38]))
    drawn = data.draw(st.lists(anything | similar, min_size=1, max_size=40))
    values = random_values((rows, groups * 256), seed=len(drawn), spread=2.0).clamp(-1, 1)
    values = values * magnitude
    places = np.random.default_rng(groups).integers(0, values.numel(), len(drawn))
    values.view(-1)[torch.from_numpy(places)] = torch.tensor(drawn, dtype=torch.float32)
    assert_close(codec, values)


@by_name
def test_edges_of_float32_survive(codec):
    largest = LARGEST_BF16 if codec.name == "bf16" else LARGEST
    for top in (largest, -largest, 1e38, 1.0, 1e-30, 2.0**-126, 1e-42, 1e-45):
        values = torch.zeros(256)
        values[3], values[200] = top, -top / 3
        assert_close(codec, values)
        assert codec.decode(codec.encode(values)).isfinite().all()
    zeros = torch.zeros(2, 512)
    assert torch.equal(codec.decode(codec.encode(zeros)), zeros)


def test_scales_just_below_each_power_of_two_keep_the_largest_in_range():
    tops = torch.from_numpy(np.linspace(1, 2, 5001, dtype=np.float32)).unsqueeze(1)
    for name in ("int8", "int4"):
        values = -tops.repeat(1, CODECS[name].group)
        values[:, :1] = tops
        assert_close(CODECS[name], values)


@by_name
def test_leading_dimensions_change_nothing(codec):
    values = random_values((3, 2, TILE // 2 + 512))
    wire = codec.encode(values)
    rows = [codec.encode(row) for row in values.reshape(6, -1)]
    assert torch.equal(wire.reshape(6, -1), torch.stack(rows))
    assert torch.equal(wire, codec.encode(values)), "the same bytes on every call"
    assert torch.equal(codec.decode(wire).reshape(6, -1), codec.decode(torch.stack(rows)))
    assert torch.equal(codec.decode(wire[1]), codec.decode(wire)[1])
    many_rows = random_values((2000, 256))
    assert torch.equal(
        codec.decode(codec.encode(many_rows))[7], codec.decode(codec.encode(many_rows[7]))
    )


@by_name
def test_no_memory_is_shared_and_any_layout_is_understood(codec):
    values = random_values((4, 512))
    kept, wire = values.clone(), codec.encode(values)
    decoded = codec.decode(wire)
    before = wire.clone()
    values.zero_()
    assert torch.equal(wire, before)
    decoded.zero_()
    assert torch.equal(wire, before)
    every_other = torch.stack([kept, kept], dim=-1)[..., 0]
    assert not every_other.is_contiguous()
    assert torch.equal(codec.encode(every_other), wire)
    at_an_odd_address = torch.cat([torch.zeros(1, dtype=torch.uint8), wire.flatten()])[1:]
    assert torch.equal(codec.decode(at_an_odd_address.view_as(wire)), codec.decode(wire))
    wider = torch.cat([wire, wire[:, :3]], dim=1)[:, : wire.shape[1]]
    assert torch.equal(codec.decode(wider), codec.decode(wire))


@by_name
@pytest.mark.parametrize("shape", [(0,), (0, 256), (3, 0)])
def test_nothing_takes_no_values_and_comes_back_as_nothing(codec, shape):
    wire = codec.encode(torch.zeros(shape))
    assert codec.decode(wire).shape == shape


@by_name
def test_wire_bytes_count_all_there_is(codec):
    overhead = {"none": 0, "bf16": 0, "int8": 0.01, "int4": 0.07}[codec.name]
    bits = {"none": 32, "bf16": 16, "int8": 8, "int4": 4}[codec.name]
    count = 13_800_192
    assert codec.wire_bytes(count) == codec.encode(torch.zeros(count)).numel()
    assert 0 <= codec.wire_bytes(count) / (count * bits / 8) - 1 <= overhead + 1e-6


@by_name
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_stays_visible(codec, bad):
    values = random_values((512,))
    values[300] = bad
    assert not codec.decode(codec.encode(values)).isfinite().all()


@by_name
def test_other_dtypes_and_lengths_are_refused(codec):
    with pytest.raises(ValueError, match=codec.name):
        codec.encode(torch.zeros(256, dtype=torch.float64))
    with pytest.raises(ValueError, match=codec.name):
        codec.decode(torch.zeros(256))
    if codec.name != "none":
        size = codec.wire_bytes(256)
        with pytest.raises(ValueError, match=codec.name):
            codec.decode(torch.zeros(size + 1, dtype=torch.uint8))
    if codec.group > 1:
        with pytest.raises(ValueError, match=codec.name):
            codec.encode(torch.zeros(codec.group + 1))


@by_name
@settings(max_examples=30, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    steps=st.integers(1, 25),
    magnitude=st.sampled_from([1e-30, 1e-4, 1.0, 1e20]),
)
def test_with_error_feedback_nothing_is_lost(codec, seed, steps, magnitude):
    inputs = [random_values((2, 256), seed + step, spread=2.0) * magnitude for step in range(steps)]
    feedback, sent = ErrorFeedback(), np.zeros((2, 256))
    for values in inputs:
        sent += codec.decode(feedback.encode(codec, values)).numpy()
    if feedback.residual is not None:
        sent += feedback.residual.numpy()
    assert (feedback.residual is not None) == codec.is_lossy
    wanted = sum(values.numpy().astype(np.float64) for values in inputs)
    largest = max(float(values.abs().max()) for values in inputs)
    # One float32 addition a step is rounded; a codec's own error is 2**10 times more or larger.
    assert np.abs(sent - wanted).max() <= steps * 2.0**-24 * 2 * largest


@lossy
def test_the_residual_is_what_did_not_arrive(codec):
    feedback, values = ErrorFeedback(), random_values((1024,))
    arrives = codec.decode(feedback.encode(codec, values))
    assert feedback.residual is not None and feedback.residual.count_nonzero() > 0
    dropped = values.numpy().astype(np.float64) - arrives.numpy().astype(np.float64)
    assert (feedback.residual.numpy() == dropped).all(), "this subtraction has no rounding"


@lossy
def test_a_round_can_be_undone_and_a_checkpoint_resumed(codec):
    first, second = random_values((512,), 1), random_values((512,), 2)
    feedback = ErrorFeedback()
    feedback.encode(codec, first)
    kept = feedback.residual
    contents, untouched = kept.clone(), second.clone()
    wire = feedback.encode(codec, second)
    assert torch.equal(kept, contents) and torch.equal(second, untouched)
    feedback.residual = kept
    assert torch.equal(feedback.encode(codec, second), wire)
    assert torch.equal(ErrorFeedback(contents).encode(codec, second), wire)


def test_a_lossless_codec_sends_the_rest_of_a_lossy_one():
    feedback, values = ErrorFeedback(), random_values((512,))
    feedback.encode(CODECS["int4"], values)
    rest = feedback.residual.clone()
    sent = CODECS["none"].decode(feedback.encode(CODECS["none"], torch.zeros(512)))
    assert torch.equal(sent, rest)
    assert feedback.residual is None


def test_a_residual_of_another_shape_is_refused():
    with pytest.raises(ValueError, match="residual"):
        ErrorFeedback(torch.zeros(256)).encode(CODECS["int8"], torch.zeros(512))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
@by_name
def test_a_gpu_writes_and_reads_the_same_bytes(codec):
    values = random_values((3, 4096))
    wire = codec.encode(values)
    assert torch.equal(codec.encode(values.cuda()).cpu(), wire)
    assert torch.equal(codec.decode(wire.cuda()).cpu(), codec.decode(wire))
