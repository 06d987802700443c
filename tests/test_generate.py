"""generate.py, compared with what transformers alone writes in another process."""

from __future__ import annotations

import io
import json
import os
import shutil
import subprocess
import sys
import unicodedata
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from tests import ROOT
from tests.runs import finish
from tests.using.models import CHAT, CONTEXT, save_model

CHATML = CHAT.replace("\n{% endfor", "<|im_end|>\n{% endfor")
STRANGER = ROOT / "tests" / "using" / "stranger_writes.py"
GREEDY = {"do_sample": False}


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    """A GPT-2 of 48 positions, which fails beyond them."""
    return save_model(tmp_path_factory.mktemp("models") / "gpt2")


@pytest.fixture(scope="module")
def chat_model(tmp_path_factory) -> Path:
    """A Qwen3 with a chat template."""
    folder = tmp_path_factory.mktemp("models") / "chat"
    return save_model(folder, "qwen3", CHAT, max_position_embeddings=512)


@pytest.fixture
def written(zygote, tmp_path):
    """What generate.py prints, with its status; one thread, as the stranger has."""
    count = 0

    def run(*words: object, typed: str | None = None) -> tuple[int, str]:
        nonlocal count
        count += 1
        log, terminal = tmp_path / f"{count}.log", tmp_path / "typed"
        terminal.write_text(typed or "")
        environ = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
        argv = [str(word) for word in words]
        pid = zygote.start(argv, log, environ, script="generate", terminal=str(terminal))
        status = zygote.wait(pid)
        return status, log.read_text()

    return run


def by_transformers(folder: Path, *cases: dict) -> list[str]:
    done = subprocess.run(
        [sys.executable, STRANGER, folder, json.dumps(cases)],
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        check=True,
    )
    texts = json.loads(done.stdout)
    assert len(texts) == len(cases) and any(texts)
    return [printable(text) for text in texts]


def mark_turns(folder: Path) -> None:
    """Give the tokenizer a mark for the end of a turn; the model writes it, an X, it again, ..."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_end|>"]})
    lm = AutoModelForCausalLM.from_pretrained(folder)
    lm.resize_token_embeddings(len(tokenizer))
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    with torch.no_grad():
        for block in lm.model.layers:  # so that the head sees the embedding alone
            block.self_attn.o_proj.weight.zero_()
            block.mlp.down_proj.weight.zero_()
        lm.model.embed_tokens.weight.zero_()
        lm.model.embed_tokens.weight[:, 0] = 1.0
        lm.model.embed_tokens.weight[end, :2] = torch.tensor([0.0, 1.0])
        lm.model.norm.weight.fill_(1.0)
        lm.lm_head.weight = torch.nn.Parameter(torch.zeros_like(lm.lm_head.weight))
        lm.lm_head.weight[end, 0] = 1.0  # after anything else
        lm.lm_head.weight[tokenizer.convert_tokens_to_ids("X"), 1] = 1.0  # after the mark
    lm.config.tie_word_embeddings = False
    lm.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def printable(text: str) -> str:
    """Without what commands a terminal, which models of random weights write, too."""
    return "".join(one for one in text if one in "\n\t" or unicodedata.category(one) != "Cc")


def test_it_writes_what_transformers_writes(model, written):
    drawn = {"do_sample": True, "temperature": 1.3, "top_k": 7, "top_p": 0.9}
    alone = by_transformers(
        model,
        {"prompt": "Mara bakes", "new": 20, "sampling": GREEDY},
        {"prompt": "naïve 👩🏽‍🚀", "new": 20, "sampling": drawn, "seed": 11},
        {"prompt": "", "new": 20, "sampling": GREEDY},
        {"prompt": "Mara bakes", "new": 90, "windows": CONTEXT},
        {"prompt": "bread and nets " * 30, "new": 30, "windows": CONTEXT},
    )
    few = ("--max-new-tokens", 20)
    assert written(model, "--prompt", "Mara bakes", "--temperature=0", *few) == (
        0,
        f"Mara bakes{alone[0]}\n",
    )
    words = ("--temperature=1.3", "--top-k=7", "--top-p=0.9", "--seed=11", *few)
    assert written("--model-name", model, "--prompt", "naïve 👩🏽‍🚀", *words) == (
        0,
        f"naïve 👩🏽‍🚀{alone[1]}\n",
    )
    assert written(model, "--temperature=0", *few) == (0, f"{alone[2]}\n")

    longer = written(model, "--prompt=Mara bakes", "--temperature=0", "--max-new-tokens=90")
    assert longer[1].endswith(f"Mara bakes{alone[3]}\n")
    assert f"after {CONTEXT} tokens the model no longer sees the beginning" in longer[1]

    prompt = "bread and nets " * 30
    status, text = written(model, "--prompt", prompt, "--temperature=0", "--max-new-tokens=30")
    assert status == 0 and text.endswith(f"{prompt}{alone[4]}\n")
    note = text.splitlines()[0]
    assert f"the model reads at most {CONTEXT}: it continues the last {CONTEXT // 2}" in note


def test_a_seed_gives_the_same_text_and_none_another(model, written):
    first, again = (written(model, "--seed=5") for _ in range(2))
    other, another = (written(model) for _ in range(2))
    assert first == again and first[0] == 0
    assert len({first[1], other[1], another[1]}) == 3


def test_each_line_that_is_typed_is_continued(model, written):
    alone = by_transformers(
        model, *({"prompt": text, "new": 8, "sampling": GREEDY} for text in ("Mara", "Ines"))
    )
    words = (model, "--interactive", "--temperature=0", "--max-new-tokens=8")
    expected = f"Mara{alone[0]}\nInes{alone[1]}\n"
    assert written(*words, typed="Mara\nInes\n") == (0, expected)
    assert written(*words, "--prompt=Mara", typed="Ines") == (0, expected)


def test_a_chat_model_answers_and_remembers(chat_model, written):
    first = {"role": "user", "content": "Who bakes?"}
    case = {"new": 12, "sampling": GREEDY}
    (answer,) = by_transformers(chat_model, {**case, "messages": [first]})
    talk = [first, {"role": "assistant", "content": answer}, {"role": "user", "content": "Why?"}]
    (why, plain) = by_transformers(
        chat_model, {**case, "messages": talk}, {**case, "prompt": "Who bakes?"}
    )
    words = (chat_model, "--temperature=0", "--max-new-tokens=12")
    said = written(*words, "--interactive", typed="Who bakes?\nWhy?\n")
    assert said == (0, f"{answer}\n{why}\n")
    raw = written(*words, "--prompt=Who bakes?", "--no-chat")
    assert raw == (0, f"Who bakes?{plain}\n")


@pytest.mark.parametrize("trained_on", [None, "text", "conversations"])
def test_a_model_chats_if_it_was_trained_to(trained_on, chat_model, written, tmp_path):
    """A base's tokenizer may have a chat template that the run here never used."""
    folder = shutil.copytree(chat_model, tmp_path / "run")
    if trained_on:
        identity = {"conversations": trained_on == "conversations" or None}
        (folder / "run.json").write_text(json.dumps({"format_version": 1, "identity": identity}))
    case = {"new": 6, "sampling": GREEDY}
    message = {"role": "user", "content": "Who bakes?"}
    (answered, continued) = by_transformers(
        chat_model, {**case, "messages": [message]}, {**case, "prompt": "Who bakes?"}
    )
    assert answered != continued
    words = (folder, "--prompt=Who bakes?", "--temperature=0", "--max-new-tokens=6")
    as_text, as_answer = f"Who bakes?{continued}\n", f"{answered}\n"
    assert written(*words)[1] == (as_text if trained_on == "text" else as_answer)
    assert written(*words, "--chat")[1] == as_answer
    assert written(*words, "--no-chat")[1] == as_text


def test_a_tokenizer_without_a_template_cannot_chat(model, written):
    status, text = written(model, "--chat", "--max-new-tokens=2")
    assert status == 2 and "has no chat template\n  fix: leave --chat out" in text
    assert written(model, "--max-new-tokens=2")[0] == 0


def test_an_answer_ends_with_its_turn(tmp_path, written):
    """Which the template ends by another token than documents have."""
    folder = save_model(tmp_path / "m", "qwen3", CHATML, max_position_embeddings=512)
    mark_turns(folder)
    words = (folder, "--prompt=Who bakes?", "--temperature=0", "--max-new-tokens=40")
    said, raw = written(*words)[1], written(*words, "--no-chat")[1]
    assert said == "\n" and raw == "Who bakes?" + 20 * "X" + "\n"


def test_a_conversation_that_is_too_long_loses_its_beginning(chat_model, written):
    question = "bread " * 30
    status, text = written(
        *(chat_model, "--interactive", "--max-new-tokens=4"),
        typed=f"{question}\n" * 14,
    )
    assert status == 0 and "the conversation is too long: its first 2 messages are left" in text
    status, text = written(
        *(chat_model, "--interactive", "--max-new-tokens=4", "--temperature=0"),
        typed="bread " * 900 + "\nbread\n",
    )
    assert status == 0 and "fix: shorten the prompt" in text and len(text.splitlines()) > 3
    status, text = written(chat_model, "--prompt", "bread " * 900)
    assert status == 2 and "reads and writes at most 512\n  fix: shorten the prompt" in text


def test_text_comes_while_it_is_written(model):
    words = [sys.executable, ROOT / "generate.py", model, "--max-new-tokens=1000000", "--seed=1"]
    environ = {**os.environ, "HF_HUB_OFFLINE": "1"}
    # Its end would come after many minutes.
    with subprocess.Popen(words, stdout=subprocess.PIPE, env=environ) as process:
        assert process.stdout is not None and process.stdout.read(20)
        assert process.poll() is None
        process.kill()


@pytest.fixture(scope="module")
def a_run(one_zygote, prepared, tmp_path_factory) -> Path:
    """A finished run with the checkpoints 3 and 6."""
    folder = tmp_path_factory.mktemp("runs") / "run"
    return finish(one_zygote, prepared, folder, 1, max_steps=6, save_every=3)


@pytest.mark.slow
def test_the_newest_model_of_a_run_writes(a_run, zygote, prepared, written, tmp_path):
    published = json.loads((a_run / "config.json").read_text())
    assert published["use_cache"] is True
    run = shutil.copytree(a_run, tmp_path / "run")
    words = ("--seed=1", "--max-new-tokens=9")
    status, text = written(run, *words)
    assert status == 0 and "newest" not in text
    assert written(run / "checkpoint-6", *words) == (0, text)
    assert written(run / "checkpoint-3", *words)[1] != text

    # A run that has not ended has no published model.
    unfinished = tmp_path / "unfinished"
    shutil.copytree(run / "checkpoint-3", unfinished / "checkpoint-3")
    status, newest = written(unfinished, *words)
    assert (
        newest == f"the newest model is {unfinished / 'checkpoint-3'}\n" + newest.partition("\n")[2]
    )
    assert newest.endswith(written(run / "checkpoint-3", *words)[1])

    # What comes after the end of a run is newer than what it published.
    finish(zygote, prepared, run, 1, max_steps=9, save_every=3)
    shutil.copytree(run / "checkpoint-9", a_run / "checkpoint-9", dirs_exist_ok=True)
    assert f"the newest model is {a_run / 'checkpoint-9'}\n" in written(a_run, *words)[1]
    # Of a damaged one, the newest that is whole takes the place.
    (a_run / "checkpoint-9" / "model.safetensors").write_bytes(b"half")
    assert "newest model is " + str(a_run / "checkpoint-6") in written(a_run, *words)[1]
    status, refused = written(a_run / "checkpoint-9", *words)
    assert status == 2 and "is not whole: model.safetensors has 4 bytes" in refused
    assert f"fix: take {a_run / 'checkpoint-6'}" in refused


def cut(file: Path) -> None:
    """Leave the first half of a file."""
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def spoil_a_number(folder: Path) -> None:
    """Write a NaN where a weight was."""
    tensors = load_file(folder / "model.safetensors")
    tensors["transformer.wpe.weight"][3, 3] = float("nan")
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


SPOILT = {
    "no number": (spoil_a_number, "holds values in transformer.wpe.weight that are not finite"),
    "no model": (shutil.rmtree, "holds no model: neither config.json nor a checkpoint"),
    "no weights": (lambda folder: (folder / "model.safetensors").unlink(), "could not be loaded"),
    "half the weights": (lambda folder: cut(folder / "model.safetensors"), "could not be loaded"),
    "half the config": (lambda folder: cut(folder / "config.json"), "could not be loaded"),
    "half the tokenizer": (lambda folder: cut(folder / "tokenizer.json"), "could not be loaded"),
}


@pytest.mark.parametrize("how", SPOILT)
def test_a_folder_without_a_whole_model_is_refused(how, model, written, tmp_path):
    spoil, found = SPOILT[how]
    folder = shutil.copytree(model, tmp_path / "model")
    spoil(folder)
    folder.mkdir(exist_ok=True)
    status, text = written(folder)
    assert status == 2 and found in text and "\n  fix: " in text and "Traceback" not in text
    shutil.rmtree(folder)  # the fix: copy or download it again
    shutil.copytree(model, folder)
    assert written(folder, "--max-new-tokens=2")[0] == 0


def test_a_model_without_its_tokenizer_is_refused(model, written, tmp_path):
    folder = shutil.copytree(model, tmp_path / "model")
    for file in folder.glob("tokenizer*"):
        file.unlink()
    status, text = written(folder)
    assert status == 2 and "\n  fix: " in text and "Traceback" not in text


@pytest.mark.parametrize(
    ("words", "found"),
    [
        ([], "no model given"),
        (["artifacts/no such run"], "is no folder here, and from the Hub it could not be loaded"),
        (["./no such run"], "./no such run: no such folder"),
        (["README.md"], "README.md is a file, and a model is a folder"),
        (["x", "--temperature=-1"], "--temperature is -1.0"),
        (["x", "--top-p=0"], "--top-p is 0.0"),
        (["x", "--top-k=-2"], "--top-k is -2"),
        (["x", "--max-new-tokens=0"], "--max-new-tokens is 0"),
        (["x", "--seed=-5"], "--seed is -5"),
    ],
)
def test_what_cannot_be_done_is_refused_before_anything_is_loaded(words, found, written):
    status, text = written(*words)
    assert status == 2 and found in text and "\n  fix: " in text and "Traceback" not in text


def test_what_a_model_writes_commands_no_terminal(capsys):
    from generate import show

    show("red \x1b[31m\x07text" + "\u202e" * 3)
    assert capsys.readouterr().out == "red text"
    show("a" * 20_000)
    assert capsys.readouterr().out == "a" * 20_000


def test_bytes_that_are_not_utf_8_are_replaced_in_what_is_typed(monkeypatch):
    from generate import prompts
    from p2p_llm_forge.config import GenerateConfig

    typed = b"na\xefve caf\xc3\xa9\n\xff\n"
    stdin = io.TextIOWrapper(io.BytesIO(typed), encoding="utf-8", errors="surrogateescape")
    monkeypatch.setattr("sys.stdin", stdin)
    assert [*prompts(GenerateConfig(interactive=True))] == ["na\ufffdve caf\u00e9", "\ufffd"]
