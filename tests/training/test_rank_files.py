"""What only one rank has reaches the main process, and nothing else of anybody's machine does."""

from __future__ import annotations

import errno
import json
import threading

import pytest
import torch

from p2p_llm_forge.errors import ForgeError
from p2p_llm_forge.peers import file_exchange
from p2p_llm_forge.peers.file_exchange import GivenUp
from p2p_llm_forge.peers.keepers import Keepers
from p2p_llm_forge.peers.store import StoreLost
from p2p_llm_forge.polling import in_thread
from p2p_llm_forge.training import rank_files, snapshot
from p2p_llm_forge.training.rank_files import RankFile, RankFiles, file_in
from tests.memory_channel import clusters, run_ranks


def test_a_rank_answers_the_main_process_whatever_happens(alone, tmp_path, monkeypatch):
    """Else it would wait for the rank until the timeout."""
    posted = []
    monkeypatch.setattr(alone, "post", lambda key, text: posted.append((key, text)))
    files = RankFiles(alone, Keepers([0]), tmp_path)
    files.write(4, {"residual": torch.zeros(1)})
    with pytest.raises(ValueError):  # a bug, which the rank prints
        files.write(5, {"residual": "no tensor"})
    RankFiles(alone, Keepers([0]), tmp_path / "gone").write(6, {"residual": torch.zeros(1)})
    answers = {key: json.loads(text) for key, text in posted}
    assert answers["saved/4"]["file"].startswith("tmp-rank-00000.safetensors.")
    assert "see what rank 0 printed" in answers["saved/5"]["failure"]
    found, fix = answers["saved/6"]["failure"]
    assert "rank 0 could not write" in found and fix == "make room on the disk"


def test_a_file_that_cannot_be_read_again_is_said_at_once(tmp_path, monkeypatch):
    """Rank 0 would look for it in its own folder, and advise to share that."""

    def fail(path):
        raise OSError(errno.EIO, "Input/output error", str(path))

    monkeypatch.setattr(rank_files, "sha256_of", fail)

    def act(cluster):
        (folder := tmp_path / f"of {cluster.rank}").mkdir()
        files = RankFiles(cluster, Keepers([0, 1]), folder)
        if not cluster.is_main:
            return files.write(4, {"residual": torch.zeros(3)})
        with pytest.raises(ForgeError, match="rank 1 cannot read .*: Input/output error") as error:
            files.collect(4, 1, folder)
        assert "check the disk of that machine" in str(error.value)

    with clusters(2) as ranks:
        run_ranks(ranks, act)


@pytest.mark.parametrize("keepers", [[0, 0, 0], [0, 1, 2], [0, 1, 1]])
def test_what_ranks_have_is_collected_wherever_their_folders_lie(tmp_path, keepers):
    folders = [tmp_path / f"of {keeper}" for keeper in keepers]
    saved = tmp_path / "checkpoint-4"
    for folder in (*folders, saved):
        folder.mkdir(exist_ok=True)

    def act(cluster):
        files = RankFiles(cluster, Keepers(keepers), folders[cluster.rank])
        if cluster.is_main:
            for rank in (1, 2):
                files.collect(4, rank, saved)
        else:
            files.write(4, {"residual": torch.full((3,), float(cluster.rank))})
        cluster.barrier()
        files.collected()

    with clusters(3) as ranks:
        run_ranks(ranks, act)
    for rank in (1, 2):
        (found,) = snapshot.tensors_in(saved / snapshot.rank_file(rank)).values()
        assert found.tolist() == [float(rank)] * 3
    assert len(list(saved.iterdir())) == 2 and not [*tmp_path.glob("of */*")], "nothing is left"


def test_a_lost_peer_ends_the_collection_from_one_that_does_not_answer(tmp_path, monkeypatch):
    """A machine without a cable closes no connection, and the run waits for the collection."""
    monkeypatch.setattr(file_exchange, "LONGEST_GAP_S", 60)
    asked, may_end = threading.Event(), threading.Event()

    def act(cluster):
        folder = tmp_path / f"of {cluster.rank}"
        folder.mkdir()
        files = RankFiles(cluster, Keepers([0, 1]), folder)
        if not cluster.is_main:
            cluster.open_files().stand_back(lambda: not (asked.set() or may_end.is_set()))
            return files.write(4, {"residual": torch.zeros(3)})
        collecting = in_thread(lambda: files.collect(4, 1, folder))
        assert asked.wait(30)
        cluster._peers.lose_store(StoreLost("no cable"))
        with pytest.raises(GivenUp):
            collecting.result(20)
        may_end.set()

    with clusters(2) as ranks:
        run_ranks(ranks, act)


@pytest.mark.parametrize(
    "answer",
    [
        *("", "[]", "{}", '{"file": "../../.ssh/id_ed25519"}', '{"file": "/etc/passwd"}'),
        *('{"file": "tmp-rank-00001.safetensors.0123abcd"}', '{"file": 1}', '{"failure": 1}'),
        *('{"failure": ["x"]}', '{"failure": [1, 2]}', '{"failure": {"found": "x"}}'),
        *('{"file": "tmp-rank-00000.safetensors.0123abcd/../x"}', '{"file": "\\ud800"}'),
    ],
)
def test_a_stranger_moves_no_other_file_of_the_main_machine(answer):
    """Whoever reaches the store can answer for a rank where there is no secret."""
    with pytest.raises(ForgeError, match="rank 0 sent what no rank of this program sends"):
        file_in(answer, 0)


def test_what_a_rank_could_not_write_is_quoted_by_its_name():
    name = "tmp-rank-00000.safetensors.0123abcd"
    assert file_in(json.dumps({"file": name}), 0) == RankFile(name)
    with pytest.raises(ForgeError, match='^rank 3 says: "full"\\n  fix: "make room"$'):
        file_in(json.dumps({"failure": ["full", "make room"]}), 3)
