"""Several ranks of one launch prepare one dataset; what ends one of them is found."""

from __future__ import annotations

import shutil

import pytest

from p2p_llm_forge.polling import wait_for
from tests.data.preparations import start_ranks
from tests.texts import contents, write_rows

pytestmark = pytest.mark.usefixtures("small_pieces")


@pytest.mark.slow
def test_several_ranks_write_the_same_bytes_as_one(text, tmp_path, undisturbed):
    ranks = start_ranks(text, tmp_path / "out", 3, pause_s=0.02)
    ended = [rank.communicate(timeout=120) for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 0, 0], ended
    assert contents(tmp_path / "out") == undisturbed
    assert "prepared" in ended[0][0] and "prepared" not in ended[1][0] + ended[2][0]


@pytest.mark.slow
def test_the_main_process_does_the_work_of_a_rank_that_was_killed(text, tmp_path, undisturbed):
    main, helper = start_ranks(text, tmp_path / "out", 2, pause_s=0.1)
    wait_for(lambda: (tmp_path / "out" / "unfinished" / "rank-1").exists())
    wait_for(lambda: any(tmp_path.rglob("pieces/*.json")))
    helper.kill()
    ended = main.communicate(timeout=120)
    helper.communicate()
    assert main.returncode == 0, ended
    assert contents(tmp_path / "out") == undisturbed


@pytest.mark.slow
def test_what_ends_a_rank_ends_the_launch_and_is_printed(text, ready_tokenizer, tmp_path):
    folder = tmp_path / "text"
    shutil.copytree(text, folder)
    for number in range(20):
        (folder / f"e{number}.parquet").write_bytes((text / "d.parquet").read_bytes())
    rows = write_rows(folder / "f.parquet", ["x"], column="body")
    ranks = start_ranks(folder, tmp_path / "out", 2, "--tokenizer", str(ready_tokenizer))
    ended = [rank.communicate(timeout=120) for rank in ranks]
    assert [rank.returncode for rank in ranks] == [2, 2], ended
    assert f"{rows} has no text column" in ended[0][1] and "Traceback" not in ended[0][1]
