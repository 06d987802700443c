"""What a start says of what travels: sizes, who and whom, and a time by measured links."""

from __future__ import annotations

import math

import pytest

from p2p_llm_forge.config import TrainConfig
from p2p_llm_forge.errors import ForgeError
from p2p_llm_forge.peers.links import Links
from p2p_llm_forge.training import fetching
from p2p_llm_forge.training.fetching import (
    Errand,
    Trip,
    announce,
    in_words,
    seconds_for,
    size_in_words,
)
from tests.memory_channel import clusters, run_ranks

NAN = math.nan
HOSTS = ["attic", "desk", "cellar", "shed"]
MB, GB = 10**6, 10**9


def links(rates):
    return Links([[NAN] * 4 for _ in range(4)], rates)


def trip(to, sources, size, what="data"):
    return Trip(what, to, tuple(sources), size, f"/home/{to}")


HOME = links(  # [from][to]: rank 0 sends slowly, rank 1 fast; rank 3 receives slowly
    [
        [NAN, 5 * MB, 5 * MB, 2 * MB],
        [50 * MB, NAN, 50 * MB, 2 * MB],
        [50 * MB, 50 * MB, NAN, 2 * MB],
        [NAN, NAN, NAN, NAN],
    ]
)


@pytest.mark.parametrize(
    "trips, seconds",
    [
        ([trip(2, [0], 100 * MB)], 20),
        ([trip(2, [0, 1], 100 * MB)], 2),  # the link into rank 2 is one, whoever sends
        ([trip(1, [0], 100 * MB), trip(2, [0], 100 * MB)], 40),  # both by the uplink of rank 0
        ([trip(3, [0, 1], 100 * MB)], 50),
        ([trip(2, [1], 100 * MB), trip(3, [1], 100 * MB)], 50),
        ([], 0),
    ],
)
def test_the_time_is_that_of_the_narrowest_end(trips, seconds):
    assert seconds_for(trips, HOME) == pytest.approx(seconds)


def test_a_line_says_what_travels_from_whom_to_whom_and_for_how_long():
    trips = [trip(1, [0], 2_150 * MB), trip(2, [0], 2_150 * MB), trip(1, [0], 3 * MB, "model")]
    assert in_words(trips, HOSTS, HOME) == [
        "data      2.15 GB each from rank 0 (attic) to rank 1 (desk) and rank 2 (cellar):"
        " about 14 min 20 s at 40 Mbit/s",
        "model     3.0 MB from rank 0 (attic) to rank 1 (desk): about 1 s at 40 Mbit/s",
    ]
    (line,) = in_words([trip(3, [0, 1, 2], 40)], HOSTS, None)
    assert line == (
        "data      1 kB from rank 0 (attic), rank 1 (desk) and rank 2 (cellar) to rank 3 (shed)"
    )


@pytest.mark.parametrize(
    "size, words", [(0, "0 kB"), (1, "1 kB"), (999_949, "1000 kB"), (3 * MB, "3.0 MB")]
)
def test_sizes_are_in_words(size, words):
    assert size_in_words(size) == words


def announced(trips, monkeypatch, **settings):
    """What rank 0 prints, or what all ranks raise; and between whom links were measured."""
    asked = []

    def measured(cluster, pairs, link_s):
        asked.append(pairs)
        return HOME

    monkeypatch.setattr(fetching, "measure_links", measured)
    config = TrainConfig(dataset_path="data", output_dir="run", **settings)
    with clusters(4) as ranks:
        try:
            run_ranks(ranks, lambda cluster: announce(config, cluster, trips))
            return None, asked
        except ForgeError as error:
            return error, asked


def test_only_links_that_are_used_are_measured_and_small_files_are_not_worth_it(
    monkeypatch, capsys
):
    error, asked = announced([trip(1, [0, 2], GB), trip(3, [2], 0)], monkeypatch)
    assert error is None and asked == [{(0, 1), (2, 1)}] * 4
    assert capsys.readouterr().out.count("data ") == 1, "rank 0 alone prints"
    assert announced([trip(1, [0], MB)], monkeypatch) == (None, [])
    assert announced([trip(1, [0], 0)], monkeypatch) == (None, []) and announced([], monkeypatch)


def test_beyond_10_gb_each_machine_is_named_with_the_time_and_yes_allows_it(monkeypatch):
    trips = [trip(1, [0], 12 * GB), trip(2, [0], 10 * GB), trip(3, [0], 11 * GB, "model")]
    error, _ = announced(trips, monkeypatch)
    first, second = error.problems
    assert "lacks the data in /home/1: 12.00 GB would come from rank 0 (" in first.found
    assert "in about 40 min 0 s at 40 Mbit/s" in first.found
    assert "more than 10.00 GB are not fetched unasked" in first.found
    assert "lacks the model in /home/3" in second.found and "--fetch yes" in second.fix
    assert announced(trips, monkeypatch, fetch="yes")[0] is None


def test_there_must_be_room_for_what_has_yet_to_come(tmp_path, monkeypatch):
    lock = tmp_path / "lock"

    def errand(missing):
        return Errand(
            *("data", "--dataset-path", tmp_path, "key", (0,), None, lock),
            begin=lambda: missing,
            fetch=lambda exchange, sources: None,
            publish=lambda: None,
        )

    assert fetching.begun(errand(10 * MB)) == 10 * MB
    assert fetching.begun(errand(None)) is None and fetching.begun(errand(0)) == 0
    free = fetching.shutil.disk_usage(tmp_path).free
    with pytest.raises(ForgeError, match="has no room for the data: .* bytes are yet to come"):
        fetching.begun(errand(free + 500 * MB))
