"""Rank 0 sees that its checkpoints lie on as many machines as are wanted; nothing ends the run."""

from __future__ import annotations

import re
import threading
import time
from types import SimpleNamespace

import pytest

from p2p_llm_forge.config import TrainConfig
from p2p_llm_forge.errors import ForgeError
from p2p_llm_forge.peers.file_exchange import GivenUp
from p2p_llm_forge.peers.keepers import Keepers
from p2p_llm_forge.training import checkpoint, copy_leader, copy_limits
from p2p_llm_forge.training.copies import Copies, Following
from p2p_llm_forge.training.copy_leader import Leading, Offered, copies_of
from p2p_llm_forge.training.pruning import IN_USE
from tests.folders import tree
from tests.memory_channel import clusters, run_ranks
from tests.training.copied import machines
from tests.waiting import wait_until

TWO = {"replicate_checkpoints": 2}


def steps(run):
    """The steps of the whole checkpoints on each machine."""
    return [
        [
            step
            for step in checkpoint.steps_saved(folder)
            if checkpoint.damage(folder / f"checkpoint-{step}") is None
        ]
        for folder in run.folders
    ]


def test_a_checkpoint_is_safe_when_it_lies_on_as_many_machines_as_were_asked_for(tmp_path):
    with machines(tmp_path, replicate_checkpoints=3) as run:
        assert run.copies[0].figures() == {}
        run.save(2)
        wait_until(lambda: run.copies[0].figures() == {"safe_step": 2})
        assert steps(run) == [[2], [2], [2]]
        (line,) = run.said
        assert line.startswith("safe      checkpoint-2 lies on 3 machines: rank 0 (")
        run.save(4)
        run.finish()
        assert run.copies[0].figures() == {"safe_step": 4}
        assert [one[:22] for one in run.said] == [
            "safe      checkpoint-2",
            "safe      checkpoint-4",
        ]


def test_where_the_only_checkpoint_lies_is_said_once(tmp_path):
    with machines(tmp_path, replicate_checkpoints=2) as run:
        run.save(2)
        wait_until(lambda: run.copies[0].figures() == {"safe_step": 2})
        run.finish()
        assert [one[:22] for one in run.said] == ["safe      checkpoint-2"]


def test_the_third_machine_fetches_from_the_second_as_well(tmp_path):
    with machines(tmp_path, replicate_checkpoints=3) as run:
        real, asked = run.exchanges[2].fetch, []

        def fetch(files, sources, *others, **how):
            asked.append(sorted(sources))
            return real(files, sources, *others, **how)

        run.exchanges[2].fetch = fetch
        run.save(2)
        run.finish()
        assert asked == [[0], [0, 1]], "what is beside it, and the checkpoint"


def test_a_machine_without_room_is_named_another_is_asked_and_the_run_goes_on(tmp_path):
    def full(*_, **__):
        raise ForgeError("no room: 5,000 bytes are missing, 7 are free", "make room there")

    with machines(tmp_path, **TWO) as run:
        real, run.exchanges[1].fetch = run.exchanges[1].fetch, full
        for step in (2, 4):
            run.save(step)
            run.finish()
        assert steps(run) == [[4, 2], [], [4, 2]]
        (warning,) = [line for line in run.said if line.startswith("warning")]
        assert "checkpoint-2 is not copied to rank 1" in warning and "make room there" in warning
        run.exchanges[1].fetch, run.exchanges[2].fetch = real, full
        run.save(6)
        run.finish()
        assert steps(run)[1] == [6], "it is asked again where others fail"
        assert run.copies[0].figures() == {"safe_step": 6}


def test_what_is_on_fewer_machines_than_asked_for_is_said_at_the_end(tmp_path):
    with machines(tmp_path, 2, replicate_checkpoints=3) as run:
        run.save(2)
        run.finish()
        assert run.copies[0].figures() == {} and steps(run) == [[2], [2]]
        assert run.said == [
            "warning: checkpoint-2 lies on 2 of the 3 machines that --replicate-checkpoints asks"
            " for"
        ]


def test_a_checkpoint_that_is_pruned_while_it_is_fetched_arrives_and_the_newest_comes_next(
    tmp_path,
):
    with machines(tmp_path, 2, **TWO, keep_checkpoints=1) as run:
        held = run.held_back(1)
        run.save(2)
        assert held.has_begun.wait(30)
        run.save(4)
        run.save(6)
        assert checkpoint.steps_saved(run.folders[0]) == [6], "the one that travels is gone"
        assert run.copies[0].figures() == {}, "training did not wait for it"
        held.may_go_on.set()
        wait_until(lambda: run.copies[0].figures() == {"safe_step": 2})
        run.finish()
        assert run.copies[0].figures() == {"safe_step": 6}
        assert steps(run) == [[6], [6]]
        assert not list(tmp_path.glob("*/tmp-*")) and not IN_USE


def test_the_end_waits_for_the_last_copy_and_says_so(tmp_path, monkeypatch):
    monkeypatch.setattr(copy_leader, "SILENCE_S", 0.0)
    with machines(tmp_path, 2, **TWO) as run:
        held = run.held_back(1)
        run.save(2)
        assert held.has_begun.wait(30)
        ending = threading.Thread(target=run.finish)
        ending.start()
        wait_until(lambda: run.said)
        assert run.said == ["copying   checkpoint-2 to another machine before this ends"]
        assert ending.is_alive() and steps(run) == [[2], []]
        held.may_go_on.set()
        ending.join(60)
        assert steps(run) == [[2], [2]]


def test_what_a_run_resumes_from_lies_on_all_its_machines(tmp_path):
    with machines(tmp_path, 2, **TWO) as run:
        run.copies[0].start(8)
        assert run.copies[0].figures() == {"safe_step": 8}
    with machines(tmp_path / "more", 2, replicate_checkpoints=3) as run:
        run.copies[0].start(8)
        assert run.copies[0].figures() == {}, "of three, there are two"


def test_a_copy_that_nobody_asked_for_is_given_up_in_time_and_made_at_the_end(
    tmp_path, monkeypatch
):
    monkeypatch.setattr(copy_limits, "END_S", 600.0)
    with machines(tmp_path, 2, save_every=10) as run:
        held = run.held_back(1)
        time.sleep(0.02)  # ten updates
        run.save(10)
        wait_until(lambda: run.said)
        (note,) = run.said
        assert "not every checkpoint is copied to rank 1" in note
        assert re.search(r"of its 0\.0 MB nothing had come after", note), note
        assert steps(run) == [[10], []]
        assert not list(run.folders[1].glob("tmp-*"))
        held.may_go_on.set()
        run.finish()
        assert steps(run) == [[10], [10]]
        assert run.said[1].startswith("safe      checkpoint-10 lies on 2 machines")
        assert not list(tmp_path.glob("*/tmp-*"))


def test_what_a_copy_would_take_is_measured_on_the_part_that_came(tmp_path, monkeypatch):
    monkeypatch.setattr(copy_limits, "END_S", 600.0)

    def half(files, sources, into, watch, **how):
        if "trainer_state.json" not in files:
            return real(files, sources, into, watch, **how)
        total = sum(one.size for one in files.values())
        watch.begin(total, total // 2)
        while not watch.is_given_up:
            time.sleep(0.005)
        raise GivenUp

    with machines(tmp_path, 2, save_every=10) as run:
        limits = run.copies[0]._limits
        limits.mark, limits._update_s = lambda step: None, 1.5  # so a copy may take 1.5 s
        real, run.exchanges[1].fetch = run.exchanges[1].fetch, half
        run.save(10)
        wait_until(lambda: run.said)
        (note,) = run.said
        (every,) = re.findall(r"MB/s take about .*; --save-every (\d+) would allow it", note)
        assert 20 <= int(every) <= 60, "3 s and more are a tenth of what 20 updates take"
        run.exchanges[1].fetch = real
        run.finish()


def test_a_copy_that_took_longer_than_a_tenth_counts_and_the_next_is_left_out(
    tmp_path, monkeypatch
):
    monkeypatch.setattr(copy_limits, "MEASURED_S", 600.0)
    monkeypatch.setattr(copy_limits, "END_S", 600.0)
    with machines(tmp_path, 2, save_every=10) as run:
        limits = run.copies[0]._limits
        limits.mark, limits._update_s, limits._total_steps = lambda step: None, 1e-5, 10**12
        run.save(10)
        wait_until(lambda: run.copies[0].figures() == {"safe_step": 10})
        wait_until(lambda: len(run.said) == 2)
        slow, safe = run.said
        assert re.search(r"not every .* to rank 1 .*; --save-every \d+ would allow it", slow), slow
        assert safe.startswith("safe      checkpoint-10 lies on 2 machines")
        run.save(20)
        wait_until(lambda: all(one.done() for one in run.copies[0]._tasks))
        assert steps(run)[1] == [10]
        run.finish()
        assert steps(run)[1] == [20, 10] and run.copies[0].figures() == {"safe_step": 20}


def test_what_is_too_large_to_be_copied_unasked_is_said_once(tmp_path, monkeypatch):
    monkeypatch.setattr(Offered, "bytes", property(lambda one: 12 * 10**9))
    with machines(tmp_path, 2) as run:
        for step in (2, 4):
            run.save(step)
            run.finish()
        assert run.said == [
            "note      checkpoints of 12.0 GB are copied only with --fetch yes, or with"
            " --replicate-checkpoints 2"
        ]
        assert steps(run) == [[4, 2], []]


@pytest.mark.parametrize(
    ("of", "asked", "parts"),
    [
        ([0, 1, 1, 3], None, [Leading, Following, Copies, Following]),
        ([0, 1], 2, [Leading, Following]),
        ([0, 1], 1, [Copies, Copies]),
        ([0, 0, 0], None, [Copies] * 3),
        ([0], 2, [Copies]),
    ],
)
def test_each_rank_has_its_part_by_the_folders_that_there_are(tmp_path, of, asked, parts):
    config, said = TrainConfig(replicate_checkpoints=asked), []
    folder = SimpleNamespace(keepers=Keepers(of), path=tmp_path)

    def part(cluster):
        plan = SimpleNamespace(total_steps=10)
        job = SimpleNamespace(config=config, cluster=cluster, plan=plan, budget=None)
        return copies_of(job, folder, said.append)

    with clusters(len(of)) as ranks:
        assert [type(one) for one in run_ranks(ranks, part)] == parts
    assert len(said) == (asked or 0) // 2 * (len(set(of)) < 2), said


def test_who_asks_for_more_machines_than_have_folders_is_told(tmp_path):
    config, said = TrainConfig(replicate_checkpoints=3), []
    folder = SimpleNamespace(keepers=Keepers([0, 0]), path=tmp_path)
    with clusters(2) as ranks:
        job = SimpleNamespace(config=config, cluster=ranks[0])
        copies_of(job, folder, said.append)
    (note,) = said
    assert "--replicate-checkpoints 3" in note and "1 folder" in note


def test_who_fetches_nothing_copies_nothing_unasked(tmp_path):
    folder = SimpleNamespace(keepers=Keepers([0, 1]), path=tmp_path)
    with clusters(2) as ranks:
        job = SimpleNamespace(config=TrainConfig(fetch="never"), cluster=ranks[0])
        assert type(copies_of(job, folder, print)) is Copies


def test_a_copy_by_default_is_made_where_there_is_time_for_it(tmp_path):
    with machines(tmp_path, save_every=10) as run:
        run.copies[0]._limits._update_s = 100.0
        run.copies[0]._limits.mark = lambda step: None
        run.save(10)
        wait_until(lambda: run.copies[0].figures() == {"safe_step": 10})
        assert steps(run) == [[10], [10], []]
        run.finish()


def test_nobody_waits_for_a_checkpoint_that_could_not_be_written(tmp_path):
    with machines(tmp_path, **TWO) as run:
        run.begin(2)
        run.copies[0].saved(2, None)
        run.finish()
        assert steps(run) == [[], [], []] and run.said == []


def test_an_error_of_ours_is_said_once_and_ends_nothing(tmp_path, monkeypatch):
    def broken(*_):
        raise KeyError("bug")

    with machines(tmp_path, **TWO) as run:
        monkeypatch.setattr(type(run.copies[0]), "_request", broken)
        for step in (2, 4):
            run.save(step)
            run.finish()
        warnings = [line for line in run.said if "KeyError('bug')" in line]
        assert len(warnings) == 1 and "training continues" in warnings[0]
        monkeypatch.undo()
        run.save(6)
        run.finish()
        assert steps(run)[1] == [6]


@pytest.mark.parametrize("answer", ["fetched", "7", '{"seconds": 1}', "{"])
def test_what_no_other_machine_answers_is_refused_by_its_name(tmp_path, answer):
    with machines(tmp_path, 2, **TWO) as run:
        run.clusters[1].post("copied/99", answer)
        with pytest.raises(ForgeError, match=r"rank 1 \("):
            run.copies[0]._has_tried(1, 99, 2, False)
        assert run.copies[0].figures() == {}


def test_what_is_offered_has_names_of_its_own_and_leaves_the_checkpoint_alone(tmp_path):
    with machines(tmp_path, 2, **TWO) as run:
        saved = run.save(2)
        run.finish()
        before = tree(saved)
        offered = Offered.of(saved)
        assert offered.folder in IN_USE and offered.files.keys() < tree(offered.folder).keys()
        offered.remove()
        offered.remove()
        assert tree(saved) == before and not offered.folder.exists() and not IN_USE
