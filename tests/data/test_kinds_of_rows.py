"""Whether rows are texts or conversations: by their columns and by what is asked for."""

from __future__ import annotations

import csv
import json

import datasets
import pytest
from transformers import AutoTokenizer

from p2p_llm_forge.config import PrepareConfig
from p2p_llm_forge.data import sources
from p2p_llm_forge.data.kinds_of_rows import are_conversations
from p2p_llm_forge.data.parts import ReadOptions
from p2p_llm_forge.data.prepare import prepare
from p2p_llm_forge.errors import ForgeError
from tests.data.preparations import with_tokenizer
from tests.data.talks import saved, talking_tokenizer, talks_in, write

TALK = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
PAIR, ALPACA = {"prompt": "a", "completion": "b"}, {"instruction": "a", "input": "", "output": "b"}
BOTH = {"text": "a", "messages": TALK}


def kinds(*paths, **asked) -> tuple[bool, list[str]]:
    config = PrepareConfig([str(path) for path in paths], "out", **asked)
    options = ReadOptions.of(config)
    return are_conversations(sources.find(config.dataset_path, options).parts, config, options)


@pytest.mark.parametrize(
    ("row", "asked", "expected"),
    [
        ({"messages": TALK}, {}, True),
        (PAIR, {}, True),
        (ALPACA, {}, True),
        ({"text": "a"}, {}, False),
        ({"prompt": "a"}, {}, False),  # refused where it is read, as it always was
        (BOTH, {}, False),
        (BOTH, {"train_on": "assistant"}, True),
        (BOTH, {"chat_template": "t.jinja"}, True),
        (BOTH, {"text_column": "messages"}, True),
        ({"chat": TALK}, {"text_column": "chat"}, True),
        (PAIR, {"text_column": "prompt"}, False),
        (PAIR, {"text_column": "prompt,completion"}, False),
        ({"text": None, "messages": TALK}, {}, False),
    ],
)
def test_columns_and_flags_decide(row, asked, expected, tmp_path):
    assert kinds(write(tmp_path / "a.jsonl", [row]), **asked)[0] is expected


def test_a_row_with_both_says_which_is_read(tmp_path):
    path = write(tmp_path / "a.jsonl", [BOTH])
    assert kinds(path)[1] == [
        f"{path}: rows have 'text' and 'messages': the text is read; with --train-on assistant, the"
        " conversations"
    ]
    assert kinds(path, train_on="assistant")[1] == []


def test_every_format_shows_its_columns(tmp_path):
    for name, row in {"text": {"text": "a"}, "pair": PAIR}.items():
        folder = tmp_path / name
        folder.mkdir()
        write(folder / "a.jsonl", [row])
        (folder / "b.json").write_text(json.dumps([row], indent=1))
        datasets.Dataset.from_list([row]).to_parquet(folder / "c.parquet")
        with (folder / "d.csv").open("w", newline="") as file:
            table = csv.DictWriter(file, row)
            table.writeheader()
            table.writerow(row)
        datasets.Dataset.from_list([row]).save_to_disk(folder / "e")
        found = {path.name: kinds(path)[0] for path in sorted(folder.iterdir())}
        assert len(found) == 5 and set(found.values()) == {name == "pair"}, found
    lists = datasets.Dataset.from_list([{"chat": TALK}])
    lists.to_parquet(tmp_path / "f.parquet")
    assert kinds(tmp_path / "f.parquet", text_column="chat")[0]


def test_columns_of_the_hub_are_looked_at(monkeypatch):
    rows = datasets.Dataset.from_list([PAIR])
    for found in (rows, rows.to_iterable_dataset()):
        monkeypatch.setattr(datasets, "load_dataset", lambda *_, found=found, **__: found)
        assert kinds("hf://datasets/owner/talks")[0]


def test_where_the_hub_shows_no_columns_conversations_are_asked_for(monkeypatch, tmp_path):
    """Their first row is not read before all are."""
    found = datasets.IterableDataset.from_generator(lambda: iter([PAIR]))
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: found)
    name, words = "hf://datasets/owner/talks", saved(talking_tokenizer(), tmp_path / "words")
    with pytest.raises(ForgeError, match="has no text column 'text'") as error:
        prepare(with_tokenizer(name, tmp_path / "out", words))
    assert "with --train-on assistant" in error.value.problems[0].fix
    prepare(with_tokenizer(name, tmp_path / "out", words, train_on="assistant"))
    assert len(talks_in(tmp_path / "out", AutoTokenizer.from_pretrained(words).pad_token_id)) == 1


def test_empty_files_and_lines_that_are_no_rows_decide_nothing(tmp_path):
    (tmp_path / "a.jsonl").write_text("")
    (tmp_path / "b.jsonl").write_text("\n[1]\nno json\n" + json.dumps(PAIR))
    (tmp_path / "c.jsonl").write_text("no json\n")
    assert kinds(tmp_path)[0]
    assert not kinds(tmp_path / "c.jsonl")[0]


def test_text_and_conversations_are_not_mixed(tmp_path):
    talks = write(tmp_path / "a.jsonl", [PAIR])
    (tmp_path / "b.txt").write_text("text")
    other = write(tmp_path / "c.jsonl", [{"text": "a"}])
    for path in (tmp_path / "b.txt", other):
        with pytest.raises(ForgeError, match="not packed into one dataset") as error:
            kinds(talks, path)
        assert "prepare them apart" in error.value.problems[0].fix


@pytest.mark.parametrize("flag", [{"train_on": "all"}, {"chat_template": "t.jinja"}])
def test_what_only_conversations_have_is_refused_for_text(flag, tmp_path):
    (tmp_path / "b.txt").write_text("text")
    texts = write(tmp_path / "c.jsonl", [{"text": "a", "id": 3}])
    for path, has in {tmp_path / "b.txt": "it is text", texts: "found text, id"}.items():
        with pytest.raises(ForgeError) as error:
            kinds(path, **flag)
        (problem,) = error.value.problems
        assert problem.found == f"{path} holds no conversations: {has}"
        ((name, value),) = flag.items()
        given = "--chat-template" if name == "chat_template" else f"--train-on {value}"
        assert problem.fix.endswith(f"or leave {given} out")
        assert not kinds(path)[0]
    pairs = write(tmp_path / "d.jsonl", [PAIR])
    with pytest.raises(ForgeError) as error:
        kinds(pairs, text_column="prompt", **flag)
    assert error.value.problems[0].fix == "leave --text-column out" and kinds(pairs, **flag)[0]
