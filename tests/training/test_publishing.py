"""Uploads to a Hub of the tests' own: what arrives there, and what is said where it cannot."""

from __future__ import annotations

import contextlib
import json
import os
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from p2p_llm_forge.training.publishing import without_paths, without_tokens
from tests import ROOT
from tests.ports import free_port
from tests.runs import TINY
from tests.training.hub_metadata import errors_in
from tests.training.stand_in_hub import TOKEN

# Of a model by the usual family, with its tokenizer, its card and its figures.
FILES = {"README.md", "all_results.json", "metrics.jsonl", "config.json", "generation_config.json"}
FILES |= {"model.safetensors", "tokenizer.json", "tokenizer_config.json", ".gitattributes"}


class StandIn:
    """A running stand-in, and what it holds."""

    def __init__(self, folder: Path, address: str) -> None:
        self.folder, self.address = folder, address

    def rule(self, **rules: Any) -> None:
        (self.folder / "rules.json").write_text(json.dumps(rules))

    def asked(self) -> list[list[str]]:
        """What this program asked it for; a library asks for something of its own too."""
        file = self.folder / "requests.jsonl"
        lines = file.read_text().splitlines() if file.exists() else []
        return [one for one in map(json.loads, lines) if one[1] != "/api/agent-harnesses"]

    def commits(self) -> list[str]:
        file = self.folder / "commits.txt"
        return file.read_text().splitlines() if file.exists() else []


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[StandIn]:
    folder = tmp_path / "hub"
    folder.mkdir()
    words = [sys.executable, "-m", "tests.training.stand_in_hub", str(folder)]
    with subprocess.Popen(words, cwd=ROOT, stdout=subprocess.PIPE, text=True) as server:
        assert server.stdout is not None
        yield StandIn(folder, server.stdout.readline().strip())
        server.kill()


def environment(hub: StandIn | None, **changes: str | None) -> dict[str, str]:
    """Of a process that may upload to the stand-in; None takes a variable out."""
    mine = {
        **{key: value for key, value in os.environ.items() if not key.startswith("HF_")},
        "HF_HOME": "/nonexistent",
        "HF_TOKEN": TOKEN,
        "HF_ENDPOINT": hub.address if hub else f"http://127.0.0.1:{free_port()}",
        "TRANSFORMERS_OFFLINE": "",
        "NO_PROXY": "127.0.0.1",
        **changes,
    }
    return {key: value for key, value in mine.items() if value is not None}


def run(words: list[str], environ: dict[str, str]) -> subprocess.CompletedProcess[str]:
    """train.py, as a user starts it; what it prints goes to `stdout`."""
    return subprocess.run(
        [sys.executable, "train.py", *words],
        cwd=ROOT,
        env=environ,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        check=False,
    )


def training(prepared: Path, folder: Path, **settings: object) -> list[str]:
    settings = {
        **{"dataset_path": prepared, "output_dir": folder, **TINY, "batch_size": 8},
        **{"max_steps": 4, "save_every": 2, "report_to": "none", "cpu_threads": 1},
        **{"compile": "off", "push_to_hub": "mara", **settings},
    }
    return [f"--{name}={value}" for name, value in settings.items()]


@pytest.fixture(scope="module")
def once(prepared: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run."""
    from p2p_llm_forge.config import TrainConfig
    from train import train

    folder = tmp_path_factory.mktemp("once") / "mara"
    settings = {**TINY, "batch_size": 8, "max_steps": 2, "report_to": "none", "cpu_threads": 1}
    train(TrainConfig(dataset_path=str(prepared), output_dir=str(folder), **settings))
    return folder


@pytest.fixture
def finished(once: Path, tmp_path: Path) -> Path:
    """A finished run, in a folder of this test's own."""
    import shutil

    return Path(shutil.copytree(once, tmp_path / "somebody" / "mara"))


def upload(finished: Path, *more: str) -> list[str]:
    return ["--output-dir", str(finished), *more]


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


@pytest.mark.parametrize("without_xet", ["", "1"])
def test_a_finished_run_is_uploaded_without_training_again(hub, finished, without_xet):
    (finished / "loss.png").write_bytes(b"\x89PNG a picture")
    (finished / "notes.txt").write_text("somebody's own")
    before = contents(finished)
    environ = environment(hub, HF_HUB_DISABLE_XET=without_xet)
    end = run(upload(finished, "--push-to-hub", "mara", "--private"), environ)
    assert end.returncode == 0, end.stdout
    assert end.stdout.splitlines()[-1] == f"uploaded  {hub.address}/me/mara"
    there = contents(hub.folder / "me" / "mara")
    assert set(there) == FILES | {"loss.png", "samples.jsonl"}
    assert there.pop(".gitattributes") == b"private"
    paths = [path for _, path in hub.asked()]
    assert any("/xorbs/" in path for path in paths) is not bool(without_xet)
    # What came by xet stays in blocks there: of it the stand-in compares the SHA-256.
    same = [name for name in there if without_xet or not name.endswith((".png", ".safetensors"))]
    assert {name: there[name] == before[name] for name in same if name != "all_results.json"} == {
        name: True for name in same if name != "all_results.json"
    }
    # Nothing says where it lay, or on which machine.
    for name, content in there.items():
        assert str(finished.parent).encode() not in content, name
    assert json.loads(there["all_results.json"])["output_dir"] == "mara"
    assert errors_in(there["README.md"].decode()) == []
    assert TOKEN not in end.stdout
    assert not any(TOKEN.encode() in one for one in contents(finished).values())


def test_what_was_uploaded_is_a_model(hub, finished, tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    assert (
        run(
            upload(finished, "--push-to-hub", "club/mara"), environment(hub, HF_HUB_DISABLE_XET="1")
        ).returncode
        == 0
    )
    there = hub.folder / "club" / "mara"
    tokenizer = AutoTokenizer.from_pretrained(there)
    model, before = (AutoModelForCausalLM.from_pretrained(one) for one in (there, finished))
    ids = tokenizer("Mara bakes", return_tensors="pt")["input_ids"]
    assert model(ids).logits.equal(before(ids).logits)


def test_an_upload_follows_the_one_before_and_removes_its_weights(hub, finished):
    words = upload(finished, "--push-to-hub", "me/mara")
    assert run(words, environment(hub)).returncode == 0
    old = hub.folder / "me" / "mara" / "model-00001-of-00002.safetensors"
    old.write_bytes(b"in parts")
    assert run(words, environment(hub)).returncode == 0
    assert not old.exists() and hub.commits() == ["After 2 updates"] * 2


def refused(hub: StandIn | None, finished: Path, *flags: str, **environ: str | None) -> str:
    """What an upload is refused with, after a look that nothing else happened."""
    before = contents(finished)
    end = run(upload(finished, *flags), environment(hub, **environ))
    assert end.returncode == 2 and "Traceback" not in end.stdout, end.stdout
    assert contents(finished) == before
    assert TOKEN not in end.stdout and not (hub and hub.commits())
    return end.stdout


def test_no_token_no_hub_and_a_token_that_may_not(hub, finished):
    push = ("--push-to-hub", "mara")
    said = refused(hub, finished, *push, HF_TOKEN=None)
    assert "this machine has no token of the Hub" in said and "set HF_TOKEN" in said
    assert hub.asked() == []
    said = refused(hub, finished, *push, HF_HUB_OFFLINE="1")
    assert "HF_HUB_OFFLINE is set" in said and "unset it" in said
    said = refused(hub, finished, *push, HF_TOKEN="hf_ofYesterday")
    assert "does not know this machine's token" in said and "hf_of" not in said
    hub.rule(role="read")
    said = refused(hub, finished, *push)
    assert "token of the Hub may only read" in said
    said = refused(None, finished, *push)
    assert "the upload to mara failed" in said and "see that the network" in said


def test_a_token_that_is_none_is_not_shown(hub, finished):
    for wrong in ("hf_not\x01aHeader", "hf_nicht-für-Köpfe", "Bearer hf_oneTooMany"):
        said = refused(hub, finished, "--push-to-hub", "mara", HF_TOKEN=wrong)
        for part in ("aHeader", "nicht-f", "oneTooMany"):
            assert part not in said, said
    assert without_tokens("a hf_abcdefgh b Bearer xyz'") == "a TOKEN b TOKEN'"


def test_a_name_that_is_taken_is_left_alone(hub, finished):
    said = refused(hub, finished, "--push-to-hub", "anna/mara")
    assert "does not belong to anna" in said and "use --push-to-hub me/mara" in said
    other = hub.folder / "me" / "mara"
    other.mkdir(parents=True)
    (other / ".gitattributes").write_text("public")
    (other / "model.safetensors").write_bytes(b"another one")
    said = refused(hub, finished, "--push-to-hub", "mara")
    assert "the Hub has a model of that name already" in said and "choose another name" in said
    assert (other / "model.safetensors").read_bytes() == b"another one"
    (other / "model.safetensors").unlink()
    said = refused(hub, finished, "--push-to-hub", "mara", "--private")
    assert "everybody sees that model" in said
    assert run(upload(finished, "--push-to-hub", "mara"), environment(hub)).returncode == 0


def test_only_a_finished_run_can_be_uploaded(hub, tmp_path):
    folder = tmp_path / "nothing"
    folder.mkdir()
    said = refused(hub, folder, "--push-to-hub", "mara")
    assert "holds no finished run" in said


def test_what_an_upload_would_be_refused_for_is_said_before_training(hub, prepared, tmp_path):
    folder = tmp_path / "run"
    for changes, found in (
        ({"HF_TOKEN": None}, "this machine has no token"),
        ({"HF_TOKEN": "hf_ofYesterday"}, "does not know this machine's token"),
    ):
        end = run(training(prepared, folder), environment(hub, **changes))
        assert end.returncode == 2 and found in end.stdout, end.stdout
        assert not folder.exists() and "updates" not in end.stdout


def test_a_failed_upload_fails_no_run_and_its_line_uploads_later(hub, prepared, tmp_path):
    hub.rule(fail={"/commit/": 500})
    folder = tmp_path / "a run"
    words = training(prepared, folder, push_checkpoints=True)
    end = run(words, environment(hub))
    assert end.returncode == 0 and "Traceback" not in end.stdout, end.stdout
    assert "warning: step 2 is not uploaded" in end.stdout and "training continues" in end.stdout
    _, _, said = end.stdout.partition("warning: not uploaded: ")
    assert "HTTP 500" in said and "no luck with TOKEN" in said and TOKEN not in end.stdout
    assert (folder / "model.safetensors").exists() and hub.commits() == []
    _, _, line = said.partition("then: ")
    hub.rule()
    later = shlex.split(line)
    assert later[:2] == ["python", "train.py"]
    end = run(later[2:], environment(hub))
    assert end.returncode == 0 and "uploaded  " in end.stdout, end.stdout
    assert "updates" not in end.stdout and hub.commits() == ["After 4 updates"]
    # So does the same command again.
    end = run([*words, "--resume=auto"], environment(hub))
    assert end.returncode == 0 and "finished already" in end.stdout, end.stdout
    assert hub.commits() == ["After 4 updates"] * 2
    assert not list(folder.glob("tmp-*"))


def test_rank_0_alone_uploads_at_checkpoints_and_at_the_end(hub, prepared, tmp_path):
    folder = tmp_path / "run"
    words = [
        *training(prepared, folder, push_checkpoints=True, world_size=2, push_to_hub="me/mara"),
        *("--master-addr=127.0.0.1", f"--master-port={free_port()}"),
    ]
    alone = environment(None, HF_TOKEN=None, HF_ENDPOINT="http://127.0.0.1:9")
    with contextlib.ExitStack() as both:
        ranks = [
            both.enter_context(
                subprocess.Popen(
                    [sys.executable, "train.py", *words, f"--rank={rank}"],
                    cwd=ROOT,
                    env=environ,
                    text=True,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.STDOUT,
                )
            )
            for rank, environ in enumerate((environment(hub), alone))
        ]
        both.callback(lambda: [rank.kill() for rank in ranks])
        printed = [rank.communicate()[0] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 0], printed
    assert hub.commits() == ["Step 2", "After 4 updates"], printed[0]
    assert f"uploaded  step 2 to {hub.address}/me/mara" in printed[0]
    assert f"uploaded  {hub.address}/me/mara" in printed[0] and "upload" not in printed[1]
    card = (hub.folder / "me" / "mara" / "README.md").read_text()
    assert "1 machine, 2 processes" in card and "| steps | 4 |" in card
    assert not list(folder.glob("tmp-*"))


@pytest.mark.parametrize(
    ("base", "shown"),
    [
        ("/home/mara/models/small", "small"),
        (f"/home/mara/models--Qwen--Qwen3-0.6B/snapshots/{'0' * 40}", "Qwen/Qwen3-0.6B"),
        ("Qwen/Qwen3-0.6B", "Qwen/Qwen3-0.6B"),
    ],
)
def test_adapters_are_uploaded_without_the_path_of_their_base(tmp_path, base, shown):
    files = {"adapter_config.json": "base_model_name_or_path", "base_model.json": "name"}
    for name, key in files.items():
        (tmp_path / name).write_text(json.dumps({key: base, "r": 4}))
    content = {name: tmp_path / name for name in files} | {"README.md": b"card"}
    uploaded = without_paths(content)
    assert {*uploaded} == {*content} and uploaded["README.md"] == b"card"
    for name, key in files.items():
        assert json.loads(uploaded[name]) == {key: shown, "r": 4}
