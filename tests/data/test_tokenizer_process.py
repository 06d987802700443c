"""Tokenizers written in Python work in processes: the same bytes, mistakes named, nobody left."""

from __future__ import annotations

import io
import json
import os
import shutil
import signal
from pathlib import Path

import psutil
import pyarrow as pa
import pytest
from transformers import ByT5Tokenizer

from p2p_llm_forge.config import PrepareConfig
from p2p_llm_forge.data import encode, parts, tokenizer_process
from p2p_llm_forge.data.prepare import prepare
from p2p_llm_forge.data.tokenizer_process import TokenizerProcess
from p2p_llm_forge.errors import ForgeError
from tests.data.preparations import start
from tests.texts import contents, some_text
from tests.waiting import wait_until

FRAGILE = Path(__file__).with_name("fragile_tokenizer.py")


@pytest.fixture
def slow_tokenizer(tmp_path):
    ByT5Tokenizer().save_pretrained(tmp_path / "byt5")
    return tmp_path / "byt5"


@pytest.fixture
def text(tmp_path):
    (tmp_path / "text.txt").write_text(some_text(2_000))
    return tmp_path / "text.txt"


def children() -> list[psutil.Process]:
    return [c for c in psutil.Process().children() if "tokenizer_process" in " ".join(c.cmdline())]


def test_any_number_of_processes_writes_the_same_bytes(
    slow_tokenizer, text, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(parts, "PIECE_BYTES", 10_000)
    monkeypatch.setattr(encode, "DOCUMENTS_AT_A_TIME", 7)
    most = []
    right = TokenizerProcess.encode

    def count(self, documents):
        most.append(len(children()))
        return right(self, documents)

    monkeypatch.setattr(TokenizerProcess, "encode", count)
    for workers in (1, 2):
        asked = PrepareConfig(
            [str(text)], str(tmp_path / f"{workers}"), tokenizer=str(slow_tokenizer),
            num_workers=workers, sequence_length=32,
        )  # fmt: skip
        prepare(asked)
        assert bool(most) == (workers == 2), "one worker needs no process, two need one"
    assert max(most) == 1 and not children()
    assert "ByT5" in capsys.readouterr().out
    assert len(contents(tmp_path / "1")) > 5
    assert contents(tmp_path / "1") == contents(tmp_path / "2")


def test_a_process_answers_as_the_tokenizer_does_and_its_failures_are_named(tmp_path, monkeypatch):
    ByT5Tokenizer().save_pretrained(tmp_path)
    shutil.copy(FRAGILE, tmp_path)
    settings = json.loads((tmp_path / "tokenizer_config.json").read_text())
    settings |= {"auto_map": {"AutoTokenizer": ["fragile_tokenizer.Fragile", None]}}
    (tmp_path / "tokenizer_config.json").write_text(
        json.dumps(settings | {"tokenizer_class": "Fragile"})
    )
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    process = TokenizerProcess({"name": str(tmp_path), "trust_remote_code": True})
    try:
        texts = ["plain", "", "ağ </s> 模型"]
        column = pa.array([text.encode() for text in texts], pa.large_binary())
        tokens, lengths = process.encode(column)
        # ByT5's tokens are bytes, moved by the three control tokens.
        assert tokens.tolist() == [byte + 3 for text in texts for byte in text.encode()]
        assert lengths.tolist() == [len(text.encode()) for text in texts]
        tokens, lengths = process.encode(pa.array([b"boom", b"fine", b"boom"], pa.large_binary()))
        assert lengths.tolist() == [-1, 4, -1]
        assert tokens.tolist() == [byte + 3 for byte in b"fine"]
        assert len(process.encode(column)[0]) == sum(len(text.encode()) for text in texts)
        [child] = children()
        child.kill()
        with pytest.raises(ForgeError, match="(?s)ended early .status -9.*--num-workers"):
            process.encode(column)
    finally:
        process.close()
    assert not children()


def test_questions_end_wherever_the_parent_was_killed():
    asked = pa.record_batch([pa.array([b"one", b"two"], pa.large_binary())], ["documents"])
    pipe = io.BytesIO()
    with pa.ipc.new_stream(pipe, asked.schema) as stream:
        stream.write_batch(asked)
        first = pipe.tell()
        stream.write_batch(asked)
        second = pipe.tell()
    sent = pipe.getvalue()
    for cut in range(len(sent)):
        heard = list(tokenizer_process._asked(io.BytesIO(sent[:cut])))
        assert heard == [asked] * ((cut >= first) + (cut >= second)), cut
    with pytest.raises(OSError):
        list(tokenizer_process._asked(io.BytesIO(bytes([8, 0, 0, 0]) * 99)))


@pytest.mark.slow
@pytest.mark.parametrize("end", [signal.SIGINT, signal.SIGKILL])
def test_no_process_outlives_a_run_that_is_ended(zygote, slow_tokenizer, text, tmp_path, end):
    text.write_text(some_text(2_000) * 20)
    more = [f"--tokenizer={slow_tokenizer}", "--num-workers=3"]
    run, log = start(zygote, text, tmp_path / "out", *more)
    child = psutil.Process(run)
    wait_until(lambda: zygote.has_ended(run) or len(child.children()) == 2)
    helpers = child.children()
    os.kill(run, end)
    assert zygote.wait(run) == (130 if end == signal.SIGINT else -9), log.read_text()
    assert "Traceback" not in log.read_text()
    assert len(helpers) == 2
    wait_until(lambda: not any(helper.is_running() for helper in helpers))
