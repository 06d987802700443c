"""What is chosen for a time: by searching all, it is the best; small texts and times are seen."""

from __future__ import annotations

import json
import math
import re
from dataclasses import replace

import pytest

from p2p_llm_forge.config import PrepareConfig, TrainConfig
from p2p_llm_forge.data.prepare import prepare
from p2p_llm_forge.errors import ForgeError
from p2p_llm_forge.training import law, planner
from p2p_llm_forge.training.planner import Text
from tests.texts import write_text

TEXT = Text(400_000, bytes_per_token=2.4, vocabulary=1024, sequence_length=128, compressed=2.6)
SPEED = {1: 5e-5, 4: 4e-4}  # seconds of a token at depths, as on a slow core


def seconds(text=TEXT, measured=SPEED):
    return planner.token_seconds(measured, text)


@pytest.mark.parametrize("time_s", [10, 100, 1000, 30_000])
def test_the_depth_with_the_lowest_expected_loss_is_chosen(time_s):
    token_s = seconds()
    chosen = planner.choose(token_s, TEXT, time_s)
    assert chosen.seconds <= time_s and chosen.is_cut_short == (chosen.seconds < 0.99 * time_s)
    read = chosen.tokens * 2.4
    size = planner.products(chosen.depth, TEXT)
    assert chosen.bits_per_byte == law.bits_per_byte(size, read, 400_000 * 2.4, 2.6)
    for depth, one in token_s.items():
        if planner.products(depth, TEXT) > 4 * 960_000:
            continue
        for part in (0.01, 0.1, 0.3, 0.5, 1.0):
            read = part * time_s / one * 2.4
            other = law.bits_per_byte(planner.products(depth, TEXT), read, 960_000, 2.6)
            assert chosen.bits_per_byte <= 1.002 * other


def test_more_time_and_faster_peers_take_deeper_models_and_lower_losses():
    text = replace(TEXT, tokens=10**9)
    chosen = [planner.choose(seconds(text), text, time_s) for time_s in (10, 100, 1000, 10_000)]
    assert [one.depth for one in chosen] == sorted(one.depth for one in chosen)
    assert chosen[0].depth < chosen[-1].depth
    losses = [one.bits_per_byte for one in chosen]
    assert losses == sorted(losses, reverse=True)
    faster = {depth: one / 2 for depth, one in seconds(text).items()}
    twice, fast = planner.choose(seconds(text), text, 200), planner.choose(faster, text, 100)
    assert twice.bits_per_byte == pytest.approx(fast.bits_per_byte, rel=1e-3)


def test_a_small_text_takes_a_smaller_model_than_a_large_one_and_is_not_read_for_ever():
    small, large = replace(TEXT, tokens=20_000), replace(TEXT, tokens=10**9)
    on_small, on_large = (planner.choose(seconds(one), one, 600) for one in (small, large))
    assert on_small.is_cut_short and on_small.epochs < 20 and not on_large.is_cut_short
    assert on_small.depth < on_large.depth and on_small.seconds < 300
    assert on_small.bits_per_byte > on_large.bits_per_byte
    words = "\n".join(planner.in_words(on_small, on_small, on_small))
    assert "ends before the time is over: give more text" in words


def test_a_loaded_model_trains_for_its_time_up_to_four_readings():
    """The law is one of models from scratch."""
    chosen, twice = (planner.choice_of_loaded(1e-4, TEXT, time_s) for time_s in (100, 200))
    assert chosen.tokens == pytest.approx(1_000_000, abs=1) and not chosen.is_cut_short
    assert chosen.seconds == pytest.approx(100, rel=1e-3) and chosen.epochs == 2.5
    assert twice.tokens == 4 * 400_000 and twice.seconds == 160 and twice.is_cut_short
    (words,) = planner.in_words(chosen, twice, twice)
    assert "the model as given" in words and "the text 2.5 times; with twice the time 4.0" in words
    (words,) = planner.in_words(twice, twice, twice)
    assert "the text 4.0 times" in words and "ends before the time is over" in words
    assert [one["bits_per_byte"] for one in planner.as_record([chosen, twice])] == [None, None]


def test_years_for_a_small_text_are_worth_what_an_hour_is():
    hour, years = (planner.choose(seconds(), TEXT, time_s) for time_s in (3600, 10**8))
    assert hour.is_cut_short and years.is_cut_short
    assert years.bits_per_byte == pytest.approx(hour.bits_per_byte, rel=1e-2)
    assert years.epochs == pytest.approx(hour.epochs, rel=0.2)


def test_speeds_lie_on_a_line_over_the_work_of_a_token():
    work = {depth: planner.work(depth, TEXT) for depth in planner.DEPTHS}
    exact = {depth: 1e-5 + 2e-10 * one for depth, one in work.items()}
    found = planner.token_seconds({depth: exact[depth] for depth in (1, 4)}, TEXT)
    assert found == pytest.approx(exact)
    # Whatever noise says, a deeper model is not faster, and nothing takes no time.
    for measured in ({1: 1e-4, 4: 1e-4}, {1: 2e-4, 4: 1e-4}, {1: 1e-6, 4: 1e-3}, {3: 1e-4}):
        found = list(planner.token_seconds(measured, TEXT).values())
        assert found == sorted(found) and found[0] > 0


@pytest.mark.parametrize("tokens", [1000, 10**5, 10**6, 10**8, 10**13])
def test_updates_are_powers_of_two_that_grow_with_the_run(tokens):
    size = planner.update_tokens_for(tokens)
    assert size & (size - 1) == 0 and size <= planner.update_tokens_for(16 * tokens)
    assert planner.update_tokens_for(250_000) == 1024


def test_a_batch_is_divisible_by_what_it_must_be():
    assert planner.batch_size_for(2048, 128, unit=1) == 16
    assert planner.batch_size_for(2048, 128, unit=3) == 15
    assert planner.batch_size_for(2048, 4096, unit=2) == 2


def test_a_choice_counts_the_updates_of_the_batch_that_is_taken():
    chosen = planner.choose(seconds(), TEXT, 100)
    taken = planner.in_updates(chosen, 10_000, fewest=20)
    assert taken.updates == chosen.tokens // 10_000 > 20 and taken.tokens == taken.updates * 10_000
    assert taken.epochs == pytest.approx(taken.tokens / TEXT.tokens)
    assert taken.seconds / taken.tokens == pytest.approx(chosen.seconds / chosen.tokens)
    assert (
        f"about {taken.updates} updates of 10,000 tokens"
        in (planner.in_words(taken, taken, taken)[0])
    )
    assert planner.in_updates(chosen, chosen.tokens, fewest=20).updates == 20
    loaded = planner.choice_of_loaded(1e-4, TEXT, 1000)  # which reads it four times
    assert planner.in_updates(loaded, 300_000, fewest=20).updates == 5
    assert planner.in_updates(loaded, 3_000_000, fewest=20).updates == 1


def test_a_batch_leaves_room_for_those_who_may_come():
    assert planner.batch_size_for(2048, 1024, unit=1) == 2
    assert planner.batch_size_for(2048, 1024, unit=1, least=16) == 16
    assert planner.batch_size_for(2048, 1024, unit=3, least=16) == 18
    assert planner.batch_size_for(2048, 32, unit=1, least=16) == 64


@pytest.mark.parametrize("is_loaded", [False, True])
def test_what_is_on_record_is_said_in_the_same_words(is_loaded):
    chosen = [planner.choose(seconds(), TEXT, time_s) for time_s in (100, 200, 150)]
    if is_loaded:
        chosen = [planner.choice_of_loaded(1e-4, TEXT, time_s) for time_s in (100, 200, 150)]
    plan = json.loads(
        json.dumps(dict(zip(planner.CHOICES, planner.as_record(chosen), strict=True)))
    )
    assert planner.words_of(plan) == planner.in_words(*chosen) != []
    plan["chosen"]["of a later version"] = 1
    assert planner.words_of(plan) == planner.in_words(*chosen)


@pytest.mark.parametrize(
    "change", [{"tokens": 0}, {"tokens": "many"}, {"epochs": None}, {"bits_per_byte": "few"}, None]
)
def test_a_record_that_lacks_what_is_needed_says_nothing(change):
    chosen = [planner.choose(seconds(), TEXT, time_s) for time_s in (100, 200, 150)]
    plan = dict(zip(planner.CHOICES, planner.as_record(chosen), strict=True))
    plan["chosen"] = change and {**plan["chosen"], **change}
    assert planner.words_of(plan) == planner.words_of({}) == []


def test_a_text_decides_its_vocabulary_and_blocks():
    assert planner.text_settings(100_000) == (512, 128)
    assert planner.text_settings(1_003_854) == (1024, 256)
    assert planner.text_settings(18_000_000) == (4096, 256)
    assert planner.text_settings(10**12) == (32768, 256)
    assert planner.text_settings(8_000)[0] == 512


def test_a_text_too_small_for_any_model_is_refused():
    with pytest.raises(ForgeError, match="(?s)100 bytes, which is too small.*at least 8,000"):
        planner.text_settings(100)
    with pytest.raises(ForgeError, match=r"(?s)900 tokens.*too little.*at least 3\.6 times as"):
        planner.require_text(replace(TEXT, tokens=900))
    planner.require_text(replace(TEXT, tokens=2_000))


@pytest.mark.parametrize(("documents", "length"), [(6, 32), (12, 128)])
def test_as_much_text_as_is_asked_for_suffices(documents, length, tmp_path, prepared):
    def learnt(text):
        words = {"tokenizer": str(prepared / "tokenizer"), "sequence_length": length}
        folder = str(tmp_path / f"of {text.name}")
        train = prepare(PrepareConfig([str(text)], folder, **words)).splits["train"]
        return replace(TEXT, tokens=train.blocks * length, sequence_length=length)

    small = write_text(tmp_path / "small.txt", documents)
    with pytest.raises(ForgeError) as refused:
        planner.require_text(learnt(small))
    times = float(re.search(r"([\d.]+) times as much", refused.value.problems[0].fix)[1])
    enough = small
    while enough.stat().st_size < times * small.stat().st_size:
        documents += 1
        enough = write_text(tmp_path / "enough.txt", documents)
    planner.require_text(learnt(enough))


def test_weights_that_decay_are_an_average_over_less_than_one_reading():
    choice = planner.in_updates(planner.choose(seconds(), TEXT, 100), 2048, fewest=20)
    for rate in (0.001, 0.01):
        decay = planner.weight_decay_for(choice, rate)
        weight, updates = 1.0, 0
        while weight > math.exp(-1):  # of an update, in those that follow
            weight, updates = weight * (1 - rate * decay), updates + 1
        assert updates * 2048 / TEXT.tokens == pytest.approx(0.7, rel=0.05)


def test_however_small_the_text_weights_do_not_decay_at_once():
    small = planner.Choice(1, 100_000, 30.0, 8192, 2.0, 10.0)  # two updates read it five times
    assert planner.weight_decay_for(small, 0.01) == 5


def test_of_a_text_that_is_hardly_read_once_the_decay_is_as_usual():
    large = replace(TEXT, tokens=10**9)
    choice = planner.in_updates(planner.choose(seconds(), large, 100), 2048, fewest=20)
    assert planner.weight_decay_for(choice, 0.0078) == TrainConfig().decay() == 0.1


def test_a_text_is_read_the_less_often_the_larger_the_model_and_never_without_end():
    sizes = [planner.products(depth, TEXT) for depth in (1, 2, 4, 8)]
    most = [planner.most_tokens(size, TEXT) for size in sizes]
    assert most == sorted(most, reverse=True) and most[-1] >= TEXT.tokens
    for size, tokens in zip(sizes, most, strict=True):
        read, unique = tokens * 2.4, TEXT.tokens * 2.4
        best = law.bits_per_byte(size, read, unique, TEXT.compressed)
        assert best <= law.bits_per_byte(size, 1.2 * read, unique, TEXT.compressed)
    assert planner.most_tokens(10**6, replace(TEXT, tokens=10**10)) > 50 * 10**10
