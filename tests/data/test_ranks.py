"""Several ranks of one launch prepare one dataset; what ends one of them is found."""

from __future__ import annotations

import os
import shutil
from concurrent.futures import Future, ThreadPoolExecutor

import pytest

from p2p_llm_forge.config import PrepareConfig
from p2p_llm_forge.data import splits, unfinished
from p2p_llm_forge.data.prepare import prepare
from p2p_llm_forge.data.unfinished import Helpers, Ranks, alive
from p2p_llm_forge.errors import ForgeError, Problem
from p2p_llm_forge.files import Pulse, beating
from tests.data.preparations import config
from tests.texts import contents, write_rows
from tests.waiting import wait_until

pytestmark = pytest.mark.usefixtures("small_pieces")


def test_a_helper_may_come_and_works_while_its_mark_is_touched(tmp_path, monkeypatch):
    assert not Helpers(tmp_path, Ranks()).are_working(), "there is none"
    helpers = Helpers(tmp_path, Ranks(0, 3))
    assert helpers.are_working(), "they may still come"
    with alive(tmp_path, Ranks(2, 3)):
        monkeypatch.setattr(unfinished, "COMES_WITHIN_S", 0.0)
        assert helpers.are_working(), "one has come"
        mark = Pulse(tmp_path / "rank-2")
        wait_until(lambda: mark.is_beating() and mark.has_changed())
        assert helpers.are_working()
    assert not helpers.are_working(), "it has left"


def test_a_helper_that_is_silent_is_gone_even_while_others_might_come(tmp_path, monkeypatch):
    helpers = Helpers(tmp_path, Ranks(0, 2))
    mark = tmp_path / "rank-1"
    for touched_ns in (1, 2):
        mark.touch()
        os.utime(mark, ns=(touched_ns, touched_ns))
        assert helpers.are_working()
    monkeypatch.setattr(unfinished, "GONE_AFTER_S", 0.0)
    assert not helpers.are_working()


def test_the_error_of_a_helper_is_raised_by_the_main_rank_field_by_field(tmp_path):
    problems = [Problem("a.txt is no text", "give another"), Problem("b", "c", where="rank 1")]
    with pytest.raises(ForgeError), alive(tmp_path, Ranks(1, 2)):
        raise ForgeError.of(problems)
    with pytest.raises(ForgeError) as raised:
        Helpers(tmp_path, Ranks(0, 2)).are_working()
    assert list(raised.value.problems) == problems


# --- whole preparations ---------------------------------------------------------------------------


def start_ranks(pool: ThreadPoolExecutor, asked: PrepareConfig, world: int) -> list[Future]:
    """One preparation by several ranks: threads, for they speak by nothing but files."""
    return [pool.submit(prepare, asked, Ranks(rank, world)) for rank in range(world)]


def test_several_ranks_write_the_same_bytes_as_one(
    text, tmp_path, undisturbed, monkeypatch, capsys
):
    right, encoded = splits.encode_piece, []
    monkeypatch.setattr(
        splits, "encode_piece", lambda number, *a: (encoded.append(number), right(number, *a))[1]
    )
    with ThreadPoolExecutor(3) as pool:
        of_ranks = start_ranks(pool, config(text, tmp_path / "out", num_workers=1), 3)
        manifests = [of_rank.result() for of_rank in of_ranks]
    assert contents(tmp_path / "out") == undisturbed
    assert manifests == [manifests[0]] * 3
    assert len(encoded) == len(set(encoded)) > 20, "no piece is tokenized twice"
    assert capsys.readouterr().out.count("prepared") == 1, "one rank prints"


def test_what_ends_a_rank_ends_the_preparation(text, ready_tokenizer, tmp_path):
    folder = tmp_path / "text"
    shutil.copytree(text, folder)
    for number in range(20):
        (folder / f"e{number}.parquet").write_bytes((text / "d.parquet").read_bytes())
    rows = write_rows(folder / "f.parquet", ["x"], column="body")
    asked = config(folder, tmp_path / "out", tokenizer=str(ready_tokenizer))
    with ThreadPoolExecutor(2) as pool:
        for of_rank in start_ranks(pool, asked, 2):
            with pytest.raises(ForgeError, match=f"{rows} has no text column"):
                of_rank.result()


def test_the_main_rank_does_the_work_of_one_that_fell_silent(
    text, tmp_path, undisturbed, monkeypatch
):
    monkeypatch.setattr(unfinished, "COMES_WITHIN_S", 120.0)
    monkeypatch.setattr(unfinished, "GONE_AFTER_S", 3.0)
    main_mark, mark = (tmp_path / "out" / "unfinished" / f"rank-{rank}" for rank in (0, 1))
    with ThreadPoolExecutor(1) as pool:
        main = pool.submit(prepare, config(text, tmp_path / "out"), Ranks(0, 2))
        wait_until(main_mark.exists)
        # What is seen of a helper that is killed before it has done a piece.
        mark.touch()
        pulse = Pulse(mark)
        with beating(mark):
            wait_until(lambda: pulse.is_beating() and pulse.has_changed())
            assert not main.done()
        main.result()
    assert contents(tmp_path / "out") == undisturbed
