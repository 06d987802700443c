"""What belongs to a run beside its checkpoints is on rank 0 when the run goes on there."""

from __future__ import annotations

import json

import pytest

from p2p_llm_forge.config import TrainConfig
from p2p_llm_forge.peers.keepers import Keepers
from p2p_llm_forge.training.fetched_record import adopt_record, fetch_figures, worth
from p2p_llm_forge.training.run_record import METRICS, SAMPLES, RunRecord
from tests.memory_channel import clusters, run_ranks

START = "a" * 32


@pytest.mark.parametrize(
    ("content", "step"),
    [
        (b"", -1),
        (b'{"step": 3}\n{"step": 5, "loss": 1}\n', 5),
        (b'{"step": 3}\n{"step": 5, "lo', 3),
        (b"\xff\xfe\n[1]\nnull\n", -1),
        (b'{"step": 3}\n' + b'{"step": "x"}\n{"loss": 2}\n', 3),
        (b'{"step": 3}\n' + b" " * (1 << 17) + b'\n{"step": 7}\n', 7),
    ],
)
def test_the_last_step_of_figures_however_they_end(tmp_path, content, step):
    (tmp_path / METRICS).write_bytes(content)
    assert last_step(tmp_path) == step
    assert last_step(tmp_path / "gone") == -1


def state_at(step, train_loss=None, **figures):
    """What a checkpoint says of the figures until it."""
    return {"step": step, "train_loss": train_loss, "figures": figures}


def last_step(folder):
    return worth(folder / METRICS, state_at(10**9))[1]


def folder_of(path, last, wrote=(METRICS, SAMPLES)):
    """A run's folder with figures until this step; None: without any."""
    path.mkdir()
    RunRecord({"seed": 0}, frozenset(wrote), START).write(path)
    if last is not None:
        (path / METRICS).write_text("".join(f'{{"step": {n}}}\n' for n in range(1, last + 1)))
    return path


def fetched(folders, step, fetch="auto", **state):
    def act(cluster):
        keepers = Keepers(list(range(len(folders))))
        config = TrainConfig("data", str(folders[cluster.rank]), fetch=fetch)
        fetch_figures(config, cluster, keepers, state_at(step, **state))

    with clusters(len(folders)) as ranks:
        run_ranks(ranks, act)
    assert not [path for folder in folders for path in folder.glob("tmp-*")]
    return last_step(folders[0])


def test_all_get_the_figures_that_reach_the_checkpoint(tmp_path):
    """Whichever machine is lost from then on, another has them."""
    folders = [folder_of(tmp_path / name, last) for name, last in (("a", 2), ("b", 3), ("c", 9))]
    (folders[2] / SAMPLES).write_text("samples of c")
    assert fetched(folders, 5) == 9
    for folder in folders:
        assert (folder / SAMPLES).read_text() == "samples of c"
        assert (folder / METRICS).read_bytes() == (folders[2] / METRICS).read_bytes()
    assert METRICS in RunRecord.read(folders[1]).wrote


def test_never_brings_no_figures(tmp_path):
    folders = [folder_of(tmp_path / name, last) for name, last in (("a", 2), ("b", 9))]
    assert fetched(folders, 5, fetch="never") == 2
    assert not (folders[0] / SAMPLES).exists()
    assert fetched(folders, 5) == 9


def test_what_rank_0_has_as_far_as_the_checkpoint_stays(tmp_path):
    """The others' lines are of what was trained after it, and comes again."""
    folders = [folder_of(tmp_path / "a", 5), folder_of(tmp_path / "b", 9)]
    assert fetched(folders, 5) == 5


@pytest.mark.parametrize("kind", ["loss", "eval_loss"])
@pytest.mark.parametrize("abandoned", [0, 1])
def test_figures_of_a_branch_that_was_left_give_way_to_those_of_the_checkpoint(
    tmp_path, kind, abandoned
):
    """One machine has trained on alone, further than the others knew; they went on without it."""
    folders, texts = [folder_of(tmp_path / name, None) for name in "abc"], []
    for name in ("left", "other", "common"):
        last, values = (9, name) if name == "left" else (5 if name == "other" else 2, name)
        found = [{"step": n, kind: 1 / n} for n in (1, 2)]
        found += [{"step": n, kind: n + len(values) / 7} for n in range(3, last + 1)]
        texts.append("".join(json.dumps(one) + "\n" for one in found))
    left, other, common = texts
    both = (left, other, common) if abandoned == 0 else (other, left, common)
    for folder, text in zip(folders, both, strict=True):
        (folder / METRICS).write_text(text)
    value = json.loads(other.splitlines()[-1])[kind]
    state = {"train_loss": value} if kind == "loss" else {"eval_loss": value}
    assert fetched(folders, 5, **state) == 5
    assert [(folder / METRICS).read_text() for folder in folders] == [other] * 3


def test_figures_of_others_stay_and_the_rest_comes(tmp_path):
    folders = [folder_of(tmp_path / "a", 1, wrote=[SAMPLES]), folder_of(tmp_path / "b", 9)]
    (folders[1] / SAMPLES).write_text("samples of b")
    assert fetched(folders, 5) == 1
    assert (folders[0] / SAMPLES).read_text() == "samples of b"


def test_a_record_is_adopted_where_there_is_none_with_the_model_where_it_lies_here(tmp_path):
    folders = [tmp_path / "a", tmp_path / "b", tmp_path / "c"]
    for folder, name in ((folders[1], "model on b"), (folders[2], "model on c")):
        folder.mkdir()
        RunRecord({"model_name": name, "seed": 7}, frozenset(["x"]), START).write(folder)
    before = [(folder / "run.json").read_bytes() for folder in folders[1:]]
    folders[0].mkdir()

    def act(cluster):
        config = TrainConfig("data", str(folders[cluster.rank]), model_name="model on a")
        adopt_record(cluster, Keepers([0, 1, 2]), config, RunRecord({}, started=START))

    with clusters(3) as ranks:
        run_ranks(ranks, act)
    adopted = RunRecord.read(folders[0])
    assert adopted == RunRecord({"model_name": "model on a", "seed": 7}, frozenset(), START)
    assert [(folder / "run.json").read_bytes() for folder in folders[1:]] == before
