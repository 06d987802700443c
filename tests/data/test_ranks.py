"""Several ranks of one launch prepare one dataset; what ends one of them is found."""

from __future__ import annotations

import os
import shutil
import signal
import time

import pytest

from p2p_llm_forge.data import ranks
from p2p_llm_forge.data.ranks import Helpers, Ranks, alive, failure_posted
from p2p_llm_forge.errors import ForgeError, Problem
from p2p_llm_forge.polling import wait_for
from tests.data.preparations import start_ranks
from tests.texts import contents, write_rows
from tests.waiting import wait_until

pytestmark = pytest.mark.usefixtures("small_pieces")


def test_helpers_are_working_while_their_marks_are_touched(tmp_path, monkeypatch):
    monkeypatch.setattr(ranks, "GONE_AFTER_S", 0.0)
    assert not Helpers(tmp_path, Ranks(0, 3)).are_working(), "nobody came in time"
    monkeypatch.setattr(ranks, "GONE_AFTER_S", 60.0)
    assert Helpers(tmp_path, Ranks(0, 3)).are_working(), "they may still come"
    assert not Helpers(tmp_path, Ranks()).are_working(), "there is none"
    helpers = Helpers(tmp_path, Ranks(0, 3))
    with alive(tmp_path, Ranks(2, 3)):
        assert helpers.are_working()
        monkeypatch.setattr(ranks, "GONE_AFTER_S", 2.5)
        wait_for(lambda: time.monotonic() - helpers._started > 2.5, 60)
        assert helpers.are_working(), "one came, and is still alive"
    assert not helpers.are_working(), "it has left"


def test_the_error_of_a_helper_is_raised_by_the_main_rank_field_by_field(tmp_path):
    problems = [Problem("a.txt is no text", "give another"), Problem("b", "c", where="rank 1")]
    with pytest.raises(ForgeError), failure_posted(tmp_path, Ranks(1, 2)):
        raise ForgeError.of(problems)
    with pytest.raises(ForgeError) as raised:
        Helpers(tmp_path, Ranks(0, 2)).are_working()
    assert list(raised.value.problems) == problems


# --- whole preparations ---------------------------------------------------------------------------


@pytest.mark.slow
def test_several_ranks_write_the_same_bytes_as_one(zygote, text, tmp_path, undisturbed):
    ranks = start_ranks(zygote, text, tmp_path / "out", 3, pause_s=0.02)
    statuses = [zygote.wait(pid) for pid, _ in ranks]
    main, *others = [log.read_text() for _, log in ranks]
    assert statuses == [0, 0, 0], main
    assert contents(tmp_path / "out") == undisturbed
    assert "prepared" in main and "prepared" not in "".join(others)


@pytest.mark.slow
def test_the_main_process_does_the_work_of_a_rank_that_was_killed(
    zygote, text, tmp_path, undisturbed
):
    (main, log), (helper, _) = start_ranks(zygote, text, tmp_path / "out", 2, pause_s=0.1)
    wait_until(lambda: (tmp_path / "out" / "unfinished" / "rank-1").exists())
    wait_until(lambda: any(tmp_path.rglob("pieces/*.json")))
    os.kill(helper, signal.SIGKILL)
    assert zygote.wait(main) == 0, log.read_text()
    assert contents(tmp_path / "out") == undisturbed


@pytest.mark.slow
def test_what_ends_a_rank_ends_the_launch_and_is_printed(zygote, text, ready_tokenizer, tmp_path):
    folder = tmp_path / "text"
    shutil.copytree(text, folder)
    for number in range(20):
        (folder / f"e{number}.parquet").write_bytes((text / "d.parquet").read_bytes())
    rows = write_rows(folder / "f.parquet", ["x"], column="body")
    ready = f"--tokenizer={ready_tokenizer}"
    ranks = start_ranks(zygote, folder, tmp_path / "out", 2, ready)
    statuses = [zygote.wait(pid) for pid, _ in ranks]
    main, _ = [log.read_text() for _, log in ranks]
    assert statuses == [2, 2], main
    assert f"{rows} has no text column" in main and "Traceback" not in main
