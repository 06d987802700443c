"""A preparation that was killed or interrupted resumes, and the bytes are the same."""

from __future__ import annotations

import shutil
from unittest import mock

import pytest

from p2p_llm_forge.data import prepare as chapters
from p2p_llm_forge.data import splits
from p2p_llm_forge.data.dataset import open_prepared
from p2p_llm_forge.data.prepare import prepare
from p2p_llm_forge.errors import ForgeError
from tests.data.preparations import BEFORE_PACKING, config, interrupt
from tests.texts import contents

pytestmark = pytest.mark.usefixtures("small_pieces")


@pytest.mark.slow
def test_killed_at_random_moments_it_resumes_to_the_same_bytes(zygote, text, tmp_path, undisturbed):
    words, log = [str(text), str(tmp_path / "out"), "30", "none"], tmp_path / "log"
    pid = zygote.start(words, log, script="tests.data.killed_again_and_again")
    assert zygote.wait(pid) == 0, log.read_text()
    killed, finished, after_some_pieces = map(int, log.read_text().split())
    assert killed >= 30 and finished >= 1 and after_some_pieces >= 10
    for number in range(finished):
        assert contents(tmp_path / "out" / str(number)) == undisturbed


def test_what_is_done_is_not_done_again(text, tmp_path, undisturbed, monkeypatch):
    right, encoded = splits.encode_piece, []

    def end_after_ten(number, *arguments):
        if len(encoded) == 10:
            raise KeyboardInterrupt
        encoded.append(number)
        return right(number, *arguments)

    monkeypatch.setattr(splits, "encode_piece", end_after_ten)
    with pytest.raises(KeyboardInterrupt):
        prepare(config(text, tmp_path / "out", num_workers=1))
    with pytest.raises(ForgeError, match="did not finish"):
        open_prepared(tmp_path / "out")
    first = list(encoded)
    monkeypatch.setattr(
        splits, "encode_piece", lambda number, *a: (encoded.append(number), right(number, *a))[1]
    )
    prepare(config(text, tmp_path / "out"))
    assert len(first) == 10 and len(encoded) == len(set(encoded)) > 20
    assert contents(tmp_path / "out") == undisturbed


def test_a_piece_that_was_damaged_on_the_disk_is_made_again(text, tmp_path, undisturbed):
    with BEFORE_PACKING, pytest.raises(KeyboardInterrupt):
        prepare(config(text, tmp_path / "out"))
    pieces = sorted((tmp_path / "out" / "unfinished" / "pieces").glob("*.tokens"))
    assert len(pieces) > 20
    pieces[3].write_bytes(b"\0" * pieces[3].stat().st_size)
    pieces[5].write_bytes(pieces[5].read_bytes()[:-2])
    pieces[7].unlink()
    pieces[9].with_suffix(".json").write_text("{")
    prepare(config(text, tmp_path / "out"))
    assert contents(tmp_path / "out") == undisturbed


def test_another_length_of_blocks_takes_the_tokens_that_are_there(text, tmp_path, monkeypatch):
    with BEFORE_PACKING, pytest.raises(KeyboardInterrupt):
        prepare(config(text, tmp_path / "out"))
    monkeypatch.setattr(splits, "encode_piece", interrupt)
    manifest = prepare(config(text, tmp_path / "out", sequence_length=64))
    assert manifest.sequence_length == 64 and manifest.splits["train"].blocks > 10


def test_a_bad_row_late_in_the_text_loses_nothing_that_was_done(text, ready_tokenizer, tmp_path):
    folder = tmp_path / "text"
    shutil.copytree(text, folder)
    (folder / "e.jsonl").write_text("{")
    out = tmp_path / "out"
    tokenizer = {"tokenizer": str(ready_tokenizer)}
    with pytest.raises(ForgeError, match="e.jsonl, line 1 is not JSON"):
        prepare(config(folder, out, **tokenizer))
    records = {path: path.stat().st_mtime_ns for path in out.rglob("pieces/*.json")}
    assert len(records) > 20
    (folder / "e.jsonl").write_text('{"text": "repaired"}\n')
    with mock.patch.object(chapters, "publish"):
        prepare(config(folder, out, **tokenizer))
    manifest = prepare(config(folder, tmp_path / "fresh", **tokenizer))
    assert manifest.splits["train"].documents > 300


def test_what_a_run_left_that_was_killed_at_the_very_end_is_removed(text, tmp_path, undisturbed):
    with mock.patch.object(shutil, "rmtree"):
        prepare(config(text, tmp_path / "out"))
    assert any((tmp_path / "out" / "unfinished" / "pieces").iterdir())
    prepare(config(text, tmp_path / "out"))
    assert contents(tmp_path / "out") == undisturbed
