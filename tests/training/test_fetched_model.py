"""A model that only some machines have reaches the others, where transformers alone finds it."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path

import pytest
from safetensors.torch import load_file

from p2p_llm_forge.errors import ForgeError
from p2p_llm_forge.model import stored
from p2p_llm_forge.peers.cluster import Cluster
from p2p_llm_forge.training import fetched_model
from p2p_llm_forge.training.fetched_model import bring_model
from p2p_llm_forge.training.run_record import RunRecord
from tests import ROOT
from tests.folders import tree
from tests.memory_channel import clusters, run_ranks
from tests.using.models import save_model

NAME = "mara/tiny"
COMMIT = "0123456789abcdef0123456789abcdef01234567"
STRANGER = ROOT / "tests" / "model" / "stranger_logits.py"


class Machines:
    """Ranks with a folder and a cache of the Hub of their own."""

    def __init__(self, config, folder: Path, monkeypatch, count: int) -> None:
        self.config, self.count, self._of_thread = config, count, threading.local()
        self.homes = [folder / f"machine {rank}" for rank in range(count)]
        for home in self.homes:
            home.mkdir(parents=True)
        monkeypatch.setattr(stored, "hub_cache", lambda: self._of_thread.cache)
        monkeypatch.setattr(fetched_model, "offline", lambda: {"offline": True})

    def cache(self, rank: int) -> Path:
        return self.homes[rank] / "hf" / "hub"

    def bring(self, names, secret=None, **settings) -> None:
        """names: --model-name by rank. Raises the ForgeError that all have raised alike."""

        def act(cluster):
            self._of_thread.cache = self.cache(cluster.rank)
            own = replace(self.config, **settings, model_name=str(names[cluster.rank]))
            with contextlib.closing(cluster):
                try:
                    bring_model(own, cluster)
                except ForgeError as error:
                    return error

        with clusters(self.count, secret=secret) as ranks:
            errors = [error for error in run_ranks(ranks, act) if error]
        assert len(errors) in (0, self.count), "all ranks end alike"
        for error in errors:
            raise error


@pytest.fixture
def machines(config, tmp_path, monkeypatch):
    return lambda count: Machines(config, tmp_path, monkeypatch, count)


@pytest.fixture(scope="session")
def model(tmp_path_factory):
    """A model in a folder, with what lies in folders of models and is none of its business."""
    folder = save_model(tmp_path_factory.mktemp("model") / "tiny", "qwen3")
    (folder / "modeling_tiny.py").write_text("raise SystemExit('executed')\n")
    (folder / "optimizer.safetensors").write_bytes(b"of a run")
    (folder / "run.json").write_text("{}")
    return folder


OTHERS = {"modeling_tiny.py", "optimizer.safetensors", "run.json"}


def put_into_cache(model: Path, cache: Path, name: str = NAME, commit: str = COMMIT) -> Path:
    """As huggingface_hub lays it out: contents by their hash, and links to them by their name."""
    home = cache / f"models--{name.replace('/', '--')}"
    snapshot = home / "snapshots" / commit
    for folder in (snapshot, home / "blobs", home / "refs"):
        folder.mkdir(parents=True)
    for path in model.iterdir():
        if path.name not in OTHERS:
            blob = home / "blobs" / stored.sha256_of(path)
            shutil.copy(path, blob)
            (snapshot / path.name).symlink_to(Path("..", "..", "blobs", blob.name))
    (home / "refs" / "main").write_text(commit)
    return snapshot


def logits_by_transformers(name: object, tmp_path: Path, home: Path | None = None):
    """What a program of transformers alone computes, which knows nothing of ours or of the Hub."""
    made = tmp_path / f"logits {len(list(tmp_path.iterdir()))}"
    environ = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(home or tmp_path / "no cache")}
    environ.pop("HF_HUB_CACHE", None)
    words = [sys.executable, STRANGER, str(name), str(made)]
    subprocess.run(words, check=True, env=environ, capture_output=True, cwd=tmp_path)
    return load_file(made)["logits"]


def same_model(one: Path, other: Path) -> bool:
    wanted = {name: content for name, content in tree(one).items() if name not in OTHERS}
    return len(wanted) > 3 and tree(other) == wanted


@pytest.mark.parametrize("secret", [None, b"of these machines alone"])
@pytest.mark.parametrize("having", [(0,), (1,), (0, 2)])
def test_a_folder_that_some_machines_have_comes_to_the_same_path_on_the_others(
    machines, model, having, secret, capsys
):
    home = machines(3)
    names = [folder / "models" / "tiny" for folder in home.homes]
    for rank in having:
        shutil.copytree(model, names[rank])
    home.bring(names, secret)
    for rank in range(3):
        assert rank in having or same_model(model, names[rank])
        assert os.listdir(names[rank].parent) == ["tiny"], "nothing else is left"
    assert capsys.readouterr().out.startswith("model     ")
    home.bring(names)
    assert not capsys.readouterr().out, "the second start has nothing to fetch"


ODD = "tab\there  two  spaces \u202e"  # not as it is printed


def test_a_folder_with_an_odd_name_is_read_and_written_where_it_is(machines, model):
    home = machines(2)
    names = [folder / ODD / "tiny" for folder in home.homes]
    shutil.copytree(model, names[0])
    home.bring(names)
    assert same_model(model, names[1])
    assert [os.listdir(folder) for folder in home.homes] == [[ODD]] * 2


@pytest.mark.parametrize("rank, field", [(0, "folder"), (1, "name")])
def test_only_the_own_folder_is_read_and_written_whatever_stands_in_the_store(
    machines, model, monkeypatch, rank, field
):
    """Without a secret, whoever reaches the port writes there in the name of a rank."""
    home = machines(2)
    names = [folder / "tiny" for folder in home.homes]
    shutil.copytree(model, names[0])
    theirs = home.homes[rank] / "of others"
    if rank == 0:
        shutil.copytree(model, theirs)
        weights = theirs / "model.safetensors"
        weights.write_bytes(bytes(weights.stat().st_size))
    real = Cluster._set

    def rewritten(cluster, key, value):
        if cluster.rank == rank and field in (sent := json.loads(value)) and "kind" in sent:
            value = json.dumps(sent | {field: str(theirs)})
        real(cluster, key, value)

    monkeypatch.setattr(Cluster, "_set", rewritten)

    def act(cluster):
        try:
            bring_model(replace(home.config, model_name=str(names[cluster.rank])), cluster)
        except ForgeError:
            cluster.announce_failure()

    with clusters(2) as ranks:
        run_ranks(ranks, act)
    assert not names[1].exists() or same_model(model, names[1])
    assert theirs.exists() == (rank == 0)


def test_a_name_of_the_hub_comes_into_the_cache_where_transformers_finds_it(
    machines, model, tmp_path
):
    home = machines(2)
    put_into_cache(model, home.cache(1))
    home.bring([NAME] * 2)
    snapshot = home.cache(0) / "models--mara--tiny" / "snapshots" / COMMIT
    assert same_model(model, snapshot)
    assert (snapshot.parents[1] / "refs" / "main").read_text() == COMMIT
    assert {path.name for path in snapshot.parents[1].iterdir()} == {"snapshots", "refs"}
    wanted = logits_by_transformers(model, tmp_path)
    found = logits_by_transformers(NAME, tmp_path, home.homes[0] / "hf")
    assert wanted.numel() > 100 and (found == wanted).all()


def test_a_cache_that_has_only_the_tokenizer_gets_the_rest(machines, model):
    home = machines(2)
    put_into_cache(model, home.cache(0))
    snapshot = put_into_cache(model, home.cache(1))
    for path in snapshot.glob("*.safetensors"):
        path.resolve().unlink()
        path.unlink()
    kept = {path.name for path in snapshot.iterdir() if path.is_symlink()}
    home.bring([NAME] * 2)
    assert {path.name for path in snapshot.iterdir()} - kept == {"model.safetensors"}
    assert len(kept) > 2 and all((snapshot / name).is_symlink() for name in kept)
    assert (snapshot / "model.safetensors").read_bytes() == (
        model / "model.safetensors"
    ).read_bytes()


def test_adapters_bring_the_base_that_they_name(machines, model, tmp_path):
    home = machines(2)
    put_into_cache(model, home.cache(0))
    names = [folder / "adapters" for folder in home.homes]
    names[0].mkdir()
    (names[0] / "adapter_config.json").write_text(
        f'{{"peft_type": "LORA", "base_model_name_or_path": "{NAME}"}}'
    )
    (names[0] / "adapter_model.safetensors").write_bytes(b"weights")
    home.bring(names)
    assert tree(names[1]) == tree(names[0])
    assert same_model(model, home.cache(1) / "models--mara--tiny" / "snapshots" / COMMIT)


def test_code_travels_only_where_it_was_said_to_be_trusted(machines, model):
    home = machines(2)
    names = [folder / "tiny" for folder in home.homes]
    shutil.copytree(model, names[0])
    home.bring(names)
    assert not (names[1] / "modeling_tiny.py").exists()
    shutil.rmtree(names[1])
    home.bring(names, trust_remote_code=True)
    assert (names[1] / "modeling_tiny.py").exists()


def test_pickled_weights_do_not_travel(machines, model):
    home = machines(2)
    names = [folder / "tiny" for folder in home.homes]
    shutil.copytree(model, names[0])
    (names[0] / "model.safetensors").rename(names[0] / "pytorch_model.bin")
    home.bring(names)
    assert not names[1].exists()


def a_run(folder: Path, started: str, wrote: tuple[str, ...] = ()) -> None:
    """What a run leaves on a machine that holds a copy of a checkpoint of it."""
    (folder / "checkpoint-6").mkdir(parents=True)
    (folder / "checkpoint-6" / "model.safetensors").write_bytes(b"a copy")
    RunRecord({}, frozenset(("checkpoint-6", *wrote)), started).write(folder)


ONE_RUN, ANOTHER = "1" * 32, "2" * 32


def test_the_model_of_a_run_comes_into_the_folders_that_the_run_has_on_other_machines(
    machines, model
):
    home = machines(3)
    names = [folder / "artifacts" / "pair" for folder in home.homes]
    shutil.copytree(model, names[0])
    a_run(names[1], ONE_RUN)
    names[2].mkdir(parents=True)  # which held no copy
    shutil.copy(names[1] / "run.json", names[2])
    shutil.copy(names[1] / "run.json", names[0])
    before = tree(names[1] / "checkpoint-6")
    home.bring(names)
    wanted = {path.name for path in model.iterdir()} - OTHERS
    for folder in names[1:]:
        assert {path.name for path in folder.iterdir()} - {"checkpoint-6"} == {*wanted, "run.json"}
        assert all((folder / name).read_bytes() == (model / name).read_bytes() for name in wanted)
        assert RunRecord.read(folder).wrote >= wanted, (
            "it is of that run, and may be replaced by it"
        )
        assert os.listdir(folder.parent) == ["pair"]
    assert tree(names[1] / "checkpoint-6") == before


def test_the_folder_of_another_run_is_left_as_it_is(machines, model):
    home = machines(2)
    names = [folder / "pair" for folder in home.homes]
    shutil.copytree(model, names[0])
    a_run(names[0], ONE_RUN)
    a_run(names[1], ANOTHER)
    before = tree(names[1])
    home.bring(names)
    assert tree(names[1]) == before


def test_a_file_that_is_not_of_the_run_is_in_the_way_until_it_is_moved(machines, model):
    home = machines(2)
    names = [folder / "pair" for folder in home.homes]
    shutil.copytree(model, names[0])
    a_run(names[0], ONE_RUN)
    a_run(names[1], ONE_RUN)
    (names[1] / "tokenizer.json").write_text("mine")
    before = tree(home.homes[1])
    with pytest.raises(ForgeError, match=r"holds tokenizer\.json, which is not of that run") as e:
        home.bring(names)
    assert tree(home.homes[1]) == before
    assert e.value.problems[0].fix == f"move {names[1] / 'tokenizer.json'} away"
    (names[1] / "tokenizer.json").rename(home.homes[1] / "kept")
    home.bring(names)
    assert (names[1] / "model.safetensors").is_file()


def notes_of_somebody(folder: Path) -> None:
    folder.mkdir()
    (folder / "notes.txt").write_text("mine")


def half_a_model(folder: Path) -> None:
    folder.mkdir()
    (folder / "config.json").write_text("{}")


def a_file(folder: Path) -> None:
    folder.write_text("mine")


def a_link_to_nothing(folder: Path) -> None:
    folder.symlink_to("nowhere")


@pytest.mark.parametrize("something", [notes_of_somebody, half_a_model, a_file, a_link_to_nothing])
def test_a_path_that_is_something_else_is_left_as_it_is(machines, model, something):
    """What it is, is said where the model is loaded, as ever."""
    home = machines(2)
    names = [folder / "tiny" for folder in home.homes]
    shutil.copytree(model, names[0])
    something(names[1])
    before = tree(home.homes[1])
    home.bring(names)
    assert tree(home.homes[1]) == before


def test_never_and_a_dry_run_fetch_nothing(machines, model):
    home = machines(2)
    names = [folder / "tiny" for folder in home.homes]
    shutil.copytree(model, names[0])
    home.bring(names, fetch="never")
    with pytest.raises(ForgeError, match="--dry-run fetches nothing") as error:
        home.bring(names, dry_run=True)
    assert str(names[1]) in str(error.value) and not os.listdir(home.homes[1])


def test_what_nobody_has_and_what_only_one_was_asked_for_stays_where_it_was(machines, model):
    home = machines(2)
    home.bring([NAME] * 2)
    home.bring([home.homes[0] / "no", home.homes[1] / "no"])
    shutil.copytree(model, home.homes[0] / "tiny")
    home.bring([home.homes[0] / "tiny", "somebody/else"])  # who has it from the Hub
    home.bring(["None", "None"])
    assert not os.listdir(home.homes[1]) and os.listdir(home.homes[0]) == ["tiny"]


def test_a_large_model_of_the_hub_is_left_to_the_hub_where_that_is_asked(
    machines, model, monkeypatch, capsys
):
    home = machines(2)
    put_into_cache(model, home.cache(0))
    for module in ("training.fetching", "training.fetched_model"):
        monkeypatch.setattr(f"p2p_llm_forge.{module}.UNASKED", 1000)
    with pytest.raises(ForgeError, match="are not fetched unasked"):
        home.bring([NAME] * 2)
    monkeypatch.setattr(fetched_model, "offline", lambda: {"offline": False})
    home.bring([NAME] * 2)
    assert "of mara/tiny are left to the Hub" in capsys.readouterr().out
    assert not os.listdir(home.homes[1])
    home.bring([NAME] * 2, fetch="yes")
    assert same_model(model, home.cache(1) / "models--mara--tiny" / "snapshots" / COMMIT)


def test_a_damaged_source_is_found_by_its_hash_and_another_is_asked(machines, model):
    """In the cache a large file is called by its hash, so that one that was changed is seen."""
    home = machines(3)
    for rank in (0, 1):
        put_into_cache(model, home.cache(rank))
    damaged = home.cache(0) / "models--mara--tiny" / "snapshots" / COMMIT / "model.safetensors"
    content = bytearray(damaged.read_bytes())
    content[-5] ^= 1
    damaged.resolve().write_bytes(content)
    home.bring([NAME] * 3)
    assert same_model(model, home.cache(2) / "models--mara--tiny" / "snapshots" / COMMIT)
