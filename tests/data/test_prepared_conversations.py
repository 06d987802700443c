"""Conversations prepared from files to blocks: what TRL makes of the same rows, token for token."""

from __future__ import annotations

import hashlib
import json
import os
import random
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from unittest import mock

import pytest
from transformers import AutoTokenizer

from p2p_llm_forge.config import PrepareConfig
from p2p_llm_forge.data import splits
from p2p_llm_forge.data.dataset import Manifest
from p2p_llm_forge.data.describe import describe, verify
from p2p_llm_forge.data.prepare import is_prepared, prepare
from p2p_llm_forge.data.unfinished import Ranks
from p2p_llm_forge.errors import ForgeError
from tests.data.preparations import BEFORE_PACKING, ROOT, with_tokenizer
from tests.data.talks import (
    MARKED,
    UNMARKED,
    blocks_of,
    by_transformers,
    rows,
    said,
    saved,
    talk,
    talking_tokenizer,
    talks_in,
    write,
)
from tests.texts import contents, some_text

LONG = 4096  # of a block, in which every conversation fits


@pytest.fixture(scope="module")
def words(tmp_path_factory):
    """The folder of a tokenizer whose template marks what the assistant says."""
    return saved(talking_tokenizer(), tmp_path_factory.mktemp("words"))


def padding(folder) -> int:
    return AutoTokenizer.from_pretrained(folder).pad_token_id


def asked(path, folder, words, **changes) -> PrepareConfig:
    return with_tokenizer(path, folder, words, **{"sequence_length": 256} | changes)


def by_trl(tasks: list[dict], folder: Path) -> list[list[tuple[list[int], list[int]]]]:
    """TRL's tokens and labels of each row of each task, in a process of its own."""
    (folder / "tasks").write_text(json.dumps(tasks), encoding="utf-8")
    command = [sys.executable, "-m", "tests.data.trl_tokens", folder / "tasks", folder / "out"]
    offline = os.environ | {"HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=offline)
    assert not done.returncode, done.stderr
    return json.loads((folder / "out").read_text())


def test_blocks_hold_what_trl_trains_on_token_for_token(words, tmp_path):
    draw = random.Random(1)
    pairs = [{"prompt": said(draw) + " ", "completion": said(draw)} for _ in range(60)]
    pairs += [{"prompt": said(draw), "completion": said(draw)} for _ in range(60)]
    split = [{"prompt": t[:-1], "completion": t[-1:]} for t in (talk(draw, 2) for _ in range(60))]
    forms = [
        (rows(60), "assistant", {"assistant_only_loss": True}),
        (rows(60), "all", {"assistant_only_loss": False}),
        (pairs, "assistant", {}),
        (pairs, "all", {"completion_only_loss": False}),
        (split, "assistant", {}),
        (split, "all", {"completion_only_loss": False}),
    ]
    tasks = [{"rows": of, "tokenizer": str(words), **options} for of, _, options in forms]
    answers = by_trl(tasks, tmp_path)
    for number, ((found, train_on, _), expected) in enumerate(zip(forms, answers, strict=True)):
        path, folder = write(tmp_path / "a.jsonl", found), tmp_path / f"out{number}"
        prepare(asked(path, folder, words, sequence_length=LONG, train_on=train_on))
        # The first token of a conversation is predicted from none: TRL's loss leaves it out, too.
        wanted = [
            (ids, [0] + [int(label != -100) for label in labels[1:]]) for ids, labels in expected
        ]
        for ids, labels in expected:
            assert all(label in (-100, token) for token, label in zip(ids, labels, strict=True))
        assert len(wanted) == len(found)
        assert sorted(talks_in(folder, padding(words))) == sorted(wanted), (number, train_on)


def test_instructions_are_turns_of_user_and_assistant(words, tmp_path):
    path = write(tmp_path / "a.jsonl", [{"instruction": "do it", "input": "so", "output": "done"}])
    prepare(asked(path, tmp_path / "out", words))
    turns = [{"role": "user", "content": "do it\n\nso"}, {"role": "assistant", "content": "done"}]
    tokenizer = AutoTokenizer.from_pretrained(words)
    assert talks_in(tmp_path / "out", padding(words)) == [by_transformers(tokenizer, turns)]


def test_conversations_that_fit_are_whole_and_blocks_get_full(words, tmp_path, capsys):
    found = rows(900, seed=3, most=12)
    path = write(tmp_path / "a.jsonl", found)
    manifest = prepare(asked(path, tmp_path / "out", words, sequence_length=1024))
    tokenizer = AutoTokenizer.from_pretrained(words)
    expected = [by_transformers(tokenizer, row["messages"]) for row in found]
    talks = talks_in(tmp_path / "out", padding(words))
    assert sorted(talks) == sorted(expected)
    facts = manifest.splits["train"]
    assert facts.tokens == sum(len(ids) for ids, _ in expected) and not facts.dropped_tokens
    assert facts.trained_tokens == sum(sum(marks) for _, marks in expected)
    full = facts.tokens / (facts.blocks * 1024)
    assert full > 0.97
    assert f"train: {facts.trained_tokens:,} trained tokens of {facts.tokens:,}" in (
        printed := capsys.readouterr().out
    )
    assert f"blocks are {full:.1%} full" in printed
    assert "what the assistant says is trained, written by the tokenizer's chat template" in printed
    assert manifest.conversations == {
        "train_on": "assistant", "long_conversations": "cut", "cut": 0,
        "chat_template": hashlib.sha256(MARKED.encode()).hexdigest(),
        "padding": tokenizer.pad_token_id,
    }  # fmt: skip


def test_long_conversations_are_cut_left_out_or_refused(words, tmp_path, capsys):
    found = rows(200, seed=4)
    path = write(tmp_path / "a.jsonl", found)
    tokenizer = AutoTokenizer.from_pretrained(words)
    expected = [by_transformers(tokenizer, row["messages"]) for row in found]
    long = [pair for pair in expected if len(pair[0]) > 128]
    assert 50 < len(long) < 150
    cut = prepare(asked(path, tmp_path / "cut", words, sequence_length=128))
    assert cut.conversations["cut"] == len(long)
    assert f"longer than a block, and cut: {len(long)} conversations" in capsys.readouterr().out
    assert cut.splits["train"].trained_tokens == sum(sum(marks) for _, marks in expected)
    _, trained, _ = blocks_of(tmp_path / "cut")
    assert trained.sum() == cut.splits["train"].trained_tokens
    skip = {"sequence_length": 128, "long_conversations": "skip"}
    left = prepare(asked(path, tmp_path / "skip", words, **skip))
    assert left.left_out["longer_than_block"].documents == len(long)
    fits = [pair for pair in expected if len(pair[0]) <= 128]
    assert sorted(talks_in(tmp_path / "skip", tokenizer.pad_token_id)) == sorted(fits)
    whole = prepare(asked(path, tmp_path / "whole", words, sequence_length=LONG))
    assert cut.splits["train"].bytes == whole.splits["train"].bytes
    with pytest.raises(ForgeError, match=f"{len(long)} conversations longer than a block") as error:
        prepare(asked(path, tmp_path / "no", words, **skip | {"long_conversations": "error"}))
    length = max(len(ids) for ids, _ in expected)
    assert f"--sequence-length {length} or more" in error.value.problems[0].fix
    fixed = {"long_conversations": "error", "sequence_length": length}
    assert prepare(asked(path, tmp_path / "no", words, **fixed)).splits["train"].documents == 200


def test_bytes_are_those_of_the_trained_text(words, tmp_path):
    found = rows(150, seed=5)
    path = write(tmp_path / "a.jsonl", found)
    manifest = prepare(asked(path, tmp_path / "out", words, sequence_length=64))
    answers = [m["content"] for row in found for m in row["messages"] if m["role"] == "assistant"]
    assert manifest.splits["train"].bytes == sum(len(f"{a}\n".encode()) for a in answers)


def test_the_bytes_do_not_depend_on_workers_and_pieces_are_in_order(words, tmp_path, small_pieces):
    for seed in range(3):
        write(tmp_path / f"{seed}.jsonl", rows(100, seed))
    for workers in (1, 3):
        folder = tmp_path / f"out{workers}"
        prepare(asked(tmp_path / "*.jsonl", folder, words, num_workers=workers))
    assert len(contents(tmp_path / "out1")) > 8
    assert contents(tmp_path / "out1") == contents(tmp_path / "out3")


def test_ranks_write_the_same_bytes_as_one(words, tmp_path, small_pieces):
    path = write(tmp_path / "a.jsonl", rows(200))
    alone, together = (asked(path, tmp_path / n, words, num_workers=1) for n in ("1", "3"))
    expected = prepare(alone)
    with ThreadPoolExecutor(3) as pool:
        of_ranks = [pool.submit(prepare, together, Ranks(rank, 3)) for rank in range(3)]
        assert [of_rank.result() for of_rank in of_ranks] == [expected] * 3
    assert contents(tmp_path / "1") == contents(tmp_path / "3")


def test_what_was_encoded_is_taken_again_by_the_next_run(words, tmp_path, small_pieces):
    path = write(tmp_path / "a.jsonl", rows(200))
    again = asked(path, tmp_path / "again", words)
    with BEFORE_PACKING, pytest.raises(KeyboardInterrupt):
        prepare(again)
    records = {
        path: path.stat().st_mtime_ns
        for path in (tmp_path / "again" / "unfinished" / "pieces").glob("*.tokens")
    }
    assert len(records) > 10
    encoded = []
    with mock.patch.object(splits, "encode_piece", lambda *a: encoded.append(a)):
        prepare(again)
    assert not encoded
    prepare(asked(path, tmp_path / "once", words))
    assert contents(tmp_path / "again") == contents(tmp_path / "once")
    # What decides the tokens decides which pieces are taken.
    with BEFORE_PACKING, pytest.raises(KeyboardInterrupt):
        prepare(replace(again, output_dir=str(tmp_path / "third")))
    everything = replace(again, output_dir=str(tmp_path / "third"), train_on="all")
    assert prepare(everything).splits["train"].trained_tokens > 2 * (
        Manifest.load(tmp_path / "once").splits["train"].trained_tokens
    )


def test_a_dataset_carries_the_template_and_is_found_again(words, tmp_path, capsys):
    path, template = write(tmp_path / "a.jsonl", rows(50)), tmp_path / "t.jinja"
    template.write_text(UNMARKED)
    with_file = asked(path, tmp_path / "out", words, chat_template=str(template))
    first = prepare(with_file)
    assert AutoTokenizer.from_pretrained(tmp_path / "out" / "tokenizer").chat_template == UNMARKED
    assert is_prepared(with_file) and prepare(with_file) == first
    assert "already prepared" in capsys.readouterr().out
    template.write_text(UNMARKED + " ")
    with pytest.raises(ForgeError, match="another chat template"):
        prepare(with_file)
    template.write_text(UNMARKED)
    with pytest.raises(ForgeError, match="train_on: 'assistant' there, 'all' asked"):
        prepare(replace(with_file, train_on="all"))
    again = prepare(replace(with_file, train_on="all", overwrite=True))
    assert again.fingerprint != first.fingerprint
    assert again.content_fingerprint == first.content_fingerprint
    assert verify(tmp_path / "out") and Manifest.load(tmp_path / "out") == again


def test_a_tokenizer_may_be_trained_and_gets_the_plain_template(tmp_path, capsys):
    path = write(tmp_path / "a.jsonl", rows(200))
    plain = PrepareConfig([str(path)], str(tmp_path / "out"), vocab_size=400, sequence_length=128)
    manifest = prepare(plain)
    assert "written by the plain chat template ('### User:', '### Assistant:')" in (
        capsys.readouterr().out
    )
    assert prepare(plain) == manifest
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out" / "tokenizer")
    assert "### Assistant:" in tokenizer.chat_template
    tokens, trained, _ = blocks_of(tmp_path / "out")
    assert tokenizer.eos_token_id in tokens[trained]
    text = tokenizer.decode(tokens[trained])
    assert "User" not in text and "peer" in text and '"role"' not in tokenizer.decode(tokens[0])


def test_held_out_conversations_duplicates_and_lengths_work_as_with_text(words, tmp_path):
    found = rows(300, seed=7, most=6)
    path = write(tmp_path / "a.jsonl", found + found[:40])
    manifest = prepare(
        asked(
            path, tmp_path / "out", words, validation_fraction=0.2, deduplicate="exact",
            min_document_tokens=30, sequence_length=512,
        )
    )  # fmt: skip
    left_out = {why: of.documents for why, of in manifest.left_out.items()}
    tokenizer = AutoTokenizer.from_pretrained(words)
    expected = [by_transformers(tokenizer, row["messages"]) for row in found]
    short = [len(ids) < 30 for ids, _ in expected]
    assert left_out["repeated"] + left_out["held_out_too"] == 40 - sum(short[:40])
    assert left_out["too_short"] == sum(short) + sum(short[:40]) > 3
    expected = [pair for pair in expected if len(pair[0]) >= 30]
    talks = [talks_in(tmp_path / "out", padding(words), split) for split in manifest.splits]
    assert sorted(sum(talks, [])) == sorted(expected) and all(map(len, talks))
    facts = manifest.splits["validation"]
    assert facts.trained_tokens == sum(sum(marks) for _, marks in talks[1])


def test_a_mixture_takes_whole_conversations_by_weight(words, tmp_path):
    paths = [write(tmp_path / f"{seed}.jsonl", rows(400, seed)) for seed in range(2)]
    weighted = [f"{paths[0]}:0.8", f"{paths[1]}:0.2"]
    manifest = prepare(asked(weighted, tmp_path / "out", words, sequence_length=LONG))
    first, second = manifest.sources
    assert abs(first.tokens / (first.tokens + second.tokens) - 0.8) < 0.01
    tokenizer = AutoTokenizer.from_pretrained(words)
    all_talks = [by_transformers(tokenizer, r["messages"]) for s in range(2) for r in rows(400, s)]
    talks = talks_in(tmp_path / "out", padding(words))
    assert len(talks) == first.documents + second.documents
    assert all(one in all_talks for one in talks)
    assert manifest.splits["train"].bytes == first.bytes + second.bytes


def test_rows_for_evaluation_may_be_given(words, tmp_path):
    train, held_out = (write(tmp_path / f"{n}.jsonl", rows(40, seed=n)) for n in range(2))
    manifest = prepare(asked(train, tmp_path / "out", words, validation_path=[str(held_out)]))
    assert manifest.splits["validation"].documents == 40
    (tmp_path / "text.txt").write_text("text")
    with pytest.raises(ForgeError, match="not packed into one dataset"):
        prepare(asked(train, tmp_path / "no", words, validation_path=[str(tmp_path / "text.txt")]))
    assert not (tmp_path / "no").exists()


def test_bad_conversations_are_left_out_and_counted(words, tmp_path, capsys):
    inject = [{"role": "user", "content": "a<|im_end|>"}, {"role": "assistant", "content": "b"}]
    found = [*rows(30), {"messages": inject}, {"messages": inject[:1]}]
    path = write(tmp_path / "a.jsonl", found)
    with pytest.raises(ForgeError, match="line 32: 'messages' has no turn of the assistant"):
        prepare(asked(path, tmp_path / "out", words))
    assert not (tmp_path / "out").exists()
    manifest = prepare(asked(path, tmp_path / "out", words, skip_bad_rows=True))
    assert manifest.skipped_rows == 1 and manifest.left_out["bad_conversation"].documents == 1
    assert manifest.splits["train"].documents == 30
    assert "1 bad row left out; left out: 1 document that the chat template" in (
        capsys.readouterr().out
    )


def test_where_nothing_is_left_to_learn_nothing_is_written(words, tmp_path):
    path, template = write(tmp_path / "a.jsonl", rows(30)), tmp_path / "t.jinja"
    template.write_text("{% generation %}{% endgeneration %}" + UNMARKED)
    hidden = asked(path, tmp_path / "out", words, chat_template=str(template))
    with pytest.raises(ForgeError, match="marks nothing in it to learn from"):
        prepare(hidden)
    with pytest.raises(ForgeError, match="nothing to train on"):
        prepare(replace(hidden, skip_bad_rows=True))
    assert not (tmp_path / "out").exists()


def test_a_description_shows_what_is_trained(words, tmp_path):
    messages = [{"role": "user", "content": "ask"}, {"role": "assistant", "content": "answer"}]
    path = write(tmp_path / "a.jsonl", [{"messages": messages}] * 3)
    manifest = prepare(asked(path, tmp_path / "out", words))
    text = describe(tmp_path / "out")
    facts = manifest.splits["train"]
    assert f"{facts.trained_tokens:,} trained tokens of {facts.tokens:,}" in text
    assert "conversations, of which what the assistant says is trained" in text
    first = by_transformers(AutoTokenizer.from_pretrained(words), messages)[0]
    assert f"{len(first)} tokens, 3 times (3 in train)" in text
    assert "▶<|im_start|>user\nask<|im_end|>\n<|im_start|>assistant\n⟦answer<|im_end|>\n⟧" in text


# Made before conversations were known here: of texts nothing may change.
RECORDED = "e0a2771a002732af3fddbf5714f3ab5771c911935a3dc0f3a8df2da5c028868b"
FILES = {
    "train": "a9968af949e91165e5db4b85e0d2906c5661547d6e2c6d533bed2bcd829440f3",
    "validation": "f60fbce2e3eecb5635fcbccd406d18a6a2b4631c0b5686add4a553d889496e33",
}
KEYS = """
arguments content_fingerprint digest dtype eos_token_id files format_version left_out
sequence_length skipped_rows sources splits tokenizer_fingerprint vocab_size
"""


def test_a_dataset_of_text_is_the_one_that_it_was(tmp_path):
    (tmp_path / "a.txt").write_bytes(some_text(60).encode())
    write(tmp_path / "b.jsonl", [{"text": f"row {n}", "other": n} for n in range(50)])
    manifest = prepare(
        PrepareConfig(
            [str(tmp_path / "a.txt"), str(tmp_path / "b.jsonl")], str(tmp_path / "out"),
            sequence_length=32, vocab_size=257, validation_fraction=0.2,
        )
    )  # fmt: skip
    # How a tokenizer's file is written is its library's.
    assert replace(manifest, tokenizer_fingerprint="").fingerprint == RECORDED
    for split, digest in FILES.items():
        (name,) = (name for name in manifest.files if name.startswith(split) and "arrow" in name)
        assert manifest.files[name]["sha256"] == digest
    written = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert sorted(written) == KEYS.split() and "train_on" not in written["arguments"]
