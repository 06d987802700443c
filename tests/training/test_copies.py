"""What another machine has fetched of a run is what rank 0 has written, or it is not there."""

from __future__ import annotations

import json

import pytest

from p2p_llm_forge.training import checkpoint
from p2p_llm_forge.training.copies import answer_of, request_to
from p2p_llm_forge.training.run_record import METRICS, SAMPLES, RunRecord
from tests.folders import tree
from tests.memory_channel import run_ranks
from tests.peers.offered_files import damage
from tests.training.copied import machines
from tests.training.saved import WEIGHTS, writer

TWO = {"replicate_checkpoints": 2}


def without_run(folder):
    """A folder but for the record of the run, which is each machine's own."""
    return {name: content for name, content in tree(folder).items() if name != "run.json"}


def test_a_copy_is_what_rank_0_has_with_what_belongs_to_the_run_beside_it(tmp_path):
    with machines(tmp_path, **TWO) as run:
        main, second, third = run.folders
        (main / SAMPLES).write_text('{"step": 2, "text": "once"}\n')
        run.save(2)
        run.finish()
        assert checkpoint.damage(second / "checkpoint-2") is None
        assert without_run(second) == without_run(main)
        assert RunRecord.read(second).wrote >= {"checkpoint-2", METRICS, SAMPLES}
        assert without_run(third) == {}, "two machines were asked for"


def test_a_line_that_is_being_written_is_left_for_the_next_time(tmp_path):
    with machines(tmp_path, 2, **TWO) as run:
        (run.folders[0] / METRICS).write_text('{"step": 1}\n{"step":')
        run.begin(2)
        saved = checkpoint.commit(run.folders[0], 2, writer(2), run.config)
        run.copies[0].saved(2, saved)
        run.finish()
        assert (run.folders[1] / METRICS).read_text() == '{"step": 1}\n'


def test_old_copies_are_pruned_as_on_rank_0(tmp_path):
    with machines(tmp_path, 2, **TWO, keep_checkpoints=2) as run:
        for step in (2, 4, 6, 8):
            run.save(step)
            run.finish()
        assert checkpoint.steps_saved(run.folders[1]) == [8, 6]
        assert without_run(run.folders[1]) == without_run(run.folders[0])


def test_what_others_have_put_there_stays_and_is_named(tmp_path):
    with machines(tmp_path, 2, **TWO) as run:
        in_the_way = run.folders[1] / "checkpoint-2"
        in_the_way.write_text("mine")
        RunRecord({}).write(run.folders[1])
        (run.folders[1] / METRICS).write_text("mine too")
        run.save(2)
        run.finish()
        assert (in_the_way.read_text(), (run.folders[1] / METRICS).read_text()) == (
            "mine",
            "mine too",
        )
        (warning,) = [line for line in run.said if "is not copied to rank 1" in line]
        assert f"{in_the_way} is in the way" in warning and "training continues" in warning
        assert "move it out of --output-dir" in warning
        in_the_way.unlink()
        run.save(4)
        run.finish()
        assert checkpoint.newest_good(run.folders[1])[0] == run.folders[1] / "checkpoint-4"


def test_a_checkpoint_that_is_here_already_is_not_fetched_again(tmp_path):
    with machines(tmp_path, 2, **TWO) as run:
        run.save(2)
        run.finish()
        folder = run.folders[1] / "checkpoint-2"
        before = {path.name: path.stat().st_ino for path in folder.iterdir()}
        run.begin(2)
        run.copies[0].saved(2, run.folders[0] / "checkpoint-2")
        run.finish()
        assert {path.name: path.stat().st_ino for path in folder.iterdir()} == before


def test_what_has_changed_since_it_came_is_no_copy_until_it_comes_again(tmp_path):
    with machines(tmp_path, 2, **TWO) as run:
        exchange, folder = run.exchanges[1], run.folders[1]
        fetch = exchange.fetch

        def change(files, sources, into, *more, **how):
            fetched = fetch(files, sources, into, *more, **how)
            if WEIGHTS in files:
                damage(into / WEIGHTS)
            return fetched

        exchange.fetch = change
        run.save(2)
        run.finish()
        assert not list(folder.glob("*checkpoint-2*"))
        assert any(f"{WEIGHTS} of {folder}" in line for line in run.said), run.said
        exchange.fetch = fetch
        run.save(4)
        run.finish()
        assert checkpoint.newest_good(folder)[0] == folder / "checkpoint-4"


@pytest.mark.parametrize("rank", [0, 1])
def test_the_end_of_a_rank_ends_what_is_under_way_and_leaves_nothing(tmp_path, rank):
    with machines(tmp_path, 2, **TWO) as run:
        held = run.held_back(1)
        run.save(2)
        assert held.has_begun.wait(30)
        run.copies[rank].close()
        held.may_go_on.set()
        run_ranks(run.copies, lambda one: one.close())
    assert not list(tmp_path.glob("*/tmp-*"))
    assert checkpoint.damage(run.folders[0] / "checkpoint-2") is None


FACTS = {"size": 4, "sha256": "0" * 64}
NO_REQUESTS = {
    "outside": {"files": {"trainer_state.json": FACTS, "../x": FACTS}},
    "outside, beside it": {"beside": {"/etc/x": FACTS}},
    "of nobody, beside it": {"beside": {"beside/x.json": FACTS}},
    "a pickle": {"files": {"trainer_state.json": FACTS, "pytorch_model.bin": FACTS}},
    "a program": {"files": {"trainer_state.json": FACTS, "a/modeling.py": FACTS}},
    "a manifest": {"files": {"trainer_state.json": FACTS, "manifest.json": FACTS}},
    "no checkpoint": {"files": {"x": FACTS}},
    "no step": {"step": -1},
    "no key": {"key": 7},
    "no rank": {"holders": [9]},
    "nobody": {"holders": []},
    "text": "fetch",
}


def test_what_no_rank_0_asks_for_is_refused_and_nothing_is_written(tmp_path):
    good = {"step": 2, "key": "k", "holders": [0], "limit_s": None, "beside": {}}
    good["files"] = {"trainer_state.json": FACTS}
    with machines(tmp_path, 2, **TWO) as run:
        before, (cluster, _) = tree(tmp_path), run.clusters
        for number, change in enumerate(NO_REQUESTS.values(), 1):
            sent = {**good, **change} if isinstance(change, dict) else change
            run.copies[1].begin(2)
            cluster.post(request_to(1, number), json.dumps(sent))
            answer = json.loads(cluster.wait_for(answer_of(number), 1))
            assert "rank 0 sent what no rank" in answer["problem"]["found"], answer
        assert tree(tmp_path) == before
