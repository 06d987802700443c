"""Rows of conversations: the four forms, one document for each in every format, and bad rows."""

from __future__ import annotations

import csv
import json
import random

import datasets
import pytest

from p2p_llm_forge.data.columns import NoTextError
from p2p_llm_forge.data.conversations import document_of, texts_of
from p2p_llm_forge.errors import ForgeError
from tests.data.reading import documents
from tests.data.talks import rows, said, write
from tests.texts import compress

ASK, ANSWER = {"role": "user", "content": "ask"}, {"role": "assistant", "content": "answer"}


def row_as_json(row, train_on="assistant", column="messages"):
    return json.loads(document_of(row, column, train_on))


def test_four_forms_of_rows_are_read():
    talk = [ASK, ANSWER]
    assert row_as_json({"messages": talk, "id": 3, "text": None}) == {"messages": talk}
    assert row_as_json({"chat": talk}, column="chat") == {"messages": talk}
    pair = {"prompt": "one ", "completion": "two"}
    assert row_as_json(pair | {"score": 1}) == pair
    both = {"prompt": [ASK], "completion": [ANSWER]}
    assert row_as_json(both) == both
    alpaca = {"instruction": "do", "input": "with", "output": "done"}
    asked = {"role": "user", "content": "do\n\nwith"}, {"role": "assistant", "content": "done"}
    assert row_as_json(alpaca) == {"messages": [*asked]}
    names = {"user": "human", "assistant": "gpt"}
    shared = [{"from": names[one["role"]], "value": one["content"]} for one in talk]
    assert row_as_json({"id": "a", "conversations": shared}) == {"messages": talk}
    assert row_as_json({"conversations": talk}) == {"messages": talk}
    assert row_as_json({"messages": json.dumps(talk)}) == {"messages": talk}  # of a CSV file
    for nothing in ({"input": ""}, {"input": None}):
        row = row_as_json({"instruction": "do", "output": "done"} | nothing)
        assert row["messages"][0]["content"] == "do"


def test_what_messages_hold_beside_their_content_is_kept_and_nulls_are_not():
    call = {"function": {"name": "f", "arguments": {"b": 1, "a": None}}}
    message = {"role": "assistant", "content": None, "tool_calls": [call], "name": None}
    tools = [{"type": "function", "function": {"name": "f"}}]
    row = {"messages": [ASK, message], "tools": json.dumps(tools)}
    kept = {"function": {"name": "f", "arguments": {"b": 1}}}
    turn = {"role": "assistant", "content": "", "tool_calls": [kept]}
    assert row_as_json(row) == {"messages": [ASK, turn], "tools": tools}
    parts = [{"type": "text", "text": "an"}, {"type": "text", "text": "swer"}]
    assert row_as_json({"messages": [ASK, ANSWER | {"content": parts}]})["messages"][1] == ANSWER


def test_what_a_template_is_to_know_besides_is_kept():
    row = {"messages": [ASK, ANSWER], "chat_template_kwargs": {"enable_thinking": False}}
    assert row_as_json(row) == row
    for bad in ({"chat_template": "x"}, [1]):
        with pytest.raises(NoTextError, match="is no object of a template's own names"):
            row_as_json(row | {"chat_template_kwargs": bad})


def test_lone_surrogates_become_the_replacement_character():
    row = {"prompt": "a", "completion": "b\ud800"}
    assert json.loads(document_of(row, "messages", "assistant"))["completion"] == "b\ufffd"


def test_a_tokenizer_is_trained_on_what_is_said():
    assert texts_of(document_of({"messages": [ASK, ANSWER]}, "messages", "all")) == "ask\n\nanswer"
    pair = document_of({"prompt": "a\u00fc", "completion": "b"}, "messages", "all")
    assert texts_of(pair) == "aü\n\nb"


BAD = {
    "is no object": ([1], " holds a list where an object is expected"),
    "has other columns": ({"text": "a"}, "holds no conversation ('messages', 'prompt' and"),
    "has only a prompt": ({"prompt": "a"}, "found prompt"),
    "has no list": ({"messages": "[}"}, "'messages' is str, expected a list of messages"),
    "has an empty list as text": ({"messages": "[]"}, "'messages' is an empty list, expected a"),
    "names its keys otherwise": (
        {"messages": [{"who": "user", "text": "a"}]},
        "messages[0] is no message with 'role' and 'content': found who, text",
    ),
    "is shared and of nobody": (
        {"conversations": [{"from": ["human"], "value": "a"}]},
        "messages[0] has the unknown role ['human']",
    ),
    "is empty": ({"messages": []}, "'messages' is an empty list"),
    "is of texts": ({"messages": ["a"]}, "messages[0] is no message with 'role' and 'content'"),
    "has no role": ({"messages": [{"content": "a"}]}, "messages[0] is no message"),
    "has an unknown role": (
        {"messages": [ASK, {"role": "robot", "content": "a"}]},
        "messages[1] has the unknown role 'robot', not system, developer, user, assistant, tool",
    ),
    "has a role of no text": ({"messages": [{"role": 1, "content": "a"}]}, "unknown role 1"),
    "has no assistant": ({"messages": [ASK]}, "'messages' has no turn of the assistant"),
    "has two system messages": (
        {"messages": [{"role": "system", "content": "a"}] * 2 + [ASK, ANSWER]},
        "'messages' has 2 system messages",
    ),
    "has an empty answer": (
        {"messages": [ASK, {"role": "assistant", "content": " \n"}]},
        "messages[1] is an empty turn of the assistant",
    ),
    "has no content": ({"messages": [ASK, {"role": "assistant"}]}, "messages[1] is an empty turn"),
    "holds a picture": (
        {"messages": [{"role": "user", "content": [{"type": "image"}]}, ANSWER]},
        "the content of messages[0] is a list of parts that are not all text",
    ),
    "holds a number": (
        {"messages": [{"role": "user", "content": 3}]}, "of messages[0] is int, expected a text"
    ),
    "completes nothing": ({"prompt": "a", "completion": " "}, "'completion' is empty"),
    "mixes forms": (
        {"prompt": "a", "completion": [ANSWER]}, "'prompt' is a text and 'completion' is list"
    ),
    "completes without an answer": (
        {"prompt": [ASK], "completion": [ASK]}, "'completion' has no turn of the assistant"
    ),
    "puts nothing out": ({"instruction": "a", "output": ""}, "'output' is empty"),
    "has an output of no text": ({"instruction": "a", "output": 3}, "'output' is int"),
    "has tools of no JSON": ({"messages": [ASK, ANSWER], "tools": "{"}, "'tools' is not JSON"),
    "has tools of no list": ({"messages": [ASK, ANSWER], "tools": "{}"}, "'tools' is no list"),
}  # fmt: skip


@pytest.mark.parametrize("what", BAD)
def test_a_row_says_what_is_wrong_with_it(what):
    row, found = BAD[what]
    with pytest.raises(NoTextError) as error:
        document_of(row, "messages", "assistant")
    assert found in error.value.found


CORRECTED = {
    "has an unknown role": {"messages": [ASK, {"role": "user", "content": "a"}, ANSWER]},
    "has no assistant": {"messages": [ASK, ANSWER]},
    "has two system messages": {"messages": [{"role": "system", "content": "aa"}, ASK, ANSWER]},
    "has an empty answer": {"messages": [ASK, ANSWER]},
    "completes nothing": {"prompt": "a", "completion": "filled"},
    "mixes forms": {"prompt": "a", "completion": "b"},
    "completes without an answer": {"prompt": [ASK], "completion": [ASK, ANSWER]},
    "puts nothing out": {"instruction": "a", "output": "filled"},
}


@pytest.mark.parametrize("what", CORRECTED)
def test_a_row_that_is_corrected_as_it_says_is_taken(what, tmp_path):
    fixes = {
        "has an unknown role": "call it one of these",
        "has two system messages": "join them to one, at first",
        "has no assistant": "add one", "completes without an answer": "add one",
        "mixes forms": "give texts for both",
    }  # fmt: skip
    path = write(tmp_path / "a.jsonl", [BAD[what][0]])
    with pytest.raises(ForgeError) as error:
        documents(path, train_on="assistant")
    assert error.value.problems[0].fix.startswith(fixes.get(what, "fill it"))
    assert documents(path, train_on="assistant", skip_bad_rows=True) == []
    write(path, [CORRECTED[what]])
    assert len(documents(path, train_on="assistant")) == 1


def test_roles_of_other_programs_get_their_names_here():
    for other, ours in {"human": "user", "gpt": "assistant"}.items():
        with pytest.raises(NoTextError) as error:
            document_of({"messages": [{"role": other, "content": "a"}]}, "messages", "all")
        assert error.value.fix == f"call it '{ours}'"


def test_all_is_trained_where_nobody_answers():
    assert row_as_json({"messages": [ASK]}, "all") == {"messages": [ASK]}


def test_a_row_is_the_same_document_in_every_format(tmp_path):
    found = [{"id": n} | row for n, row in enumerate(rows(60, seed=2))]
    found[5]["messages"][-1]["name"] = "berta"  # null in all others, where there are columns
    lines = write(tmp_path / "a.jsonl", found)
    compress(tmp_path / "b.jsonl.gz", lines.read_bytes())
    (tmp_path / "c.json").write_text(json.dumps(found, indent=1))
    (tmp_path / "d.json").write_bytes(lines.read_bytes())
    table = datasets.Dataset.from_list(found)
    table.to_parquet(tmp_path / "e.parquet", batch_size=7)
    compress(tmp_path / "f.parquet.gz", (tmp_path / "e.parquet").read_bytes())
    table.save_to_disk(tmp_path / "g")
    expected = [json.dumps({"messages": row["messages"]}, ensure_ascii=False) for row in found]
    for name in ("a.jsonl", "b.jsonl.gz", "c.json", "d.json", "e.parquet", "f.parquet.gz", "g"):
        read = documents(tmp_path / name, train_on="assistant", piece_bytes=500)
        assert [json.loads(one) for one in read] == [json.loads(one) for one in expected], name
        assert read == documents(lines, train_on="assistant"), name


@pytest.mark.parametrize("delimiter", [",", ";", "\t"])
def test_flat_rows_are_read_from_csv(tmp_path, delimiter):
    draw = random.Random(4)
    pairs = [{"prompt": said(draw), "completion": said(draw)} for _ in range(40)]
    alpaca = [{"instruction": said(draw), "input": "", "output": said(draw)} for _ in range(40)]
    for flat in (pairs, alpaca):
        with (tmp_path / "a.csv").open("w", encoding="utf-8", newline="") as file:
            table = csv.DictWriter(file, ["id", *flat[0]], delimiter=delimiter)
            table.writeheader()
            table.writerows({"id": n} | row for n, row in enumerate(flat))
        read = documents(tmp_path / "a.csv", train_on="assistant")
        lines = write(tmp_path / "a.jsonl", flat)
        assert read == documents(lines, train_on="assistant") and len(read) == 40


def test_a_bad_row_is_named_or_left_out_in_every_format(tmp_path):
    good, bad = {"prompt": "a", "completion": "b"}, {"prompt": "a", "completion": ""}
    found = [good, good, bad, good]
    write(tmp_path / "a.jsonl", found)
    (tmp_path / "b.json").write_text(json.dumps(found, indent=1))
    table = datasets.Dataset.from_list(found)
    table.to_parquet(tmp_path / "c.parquet")
    table.save_to_disk(tmp_path / "d")
    table.to_csv(tmp_path / "e.csv")
    places = {
        "a.jsonl": "line 3", "b.json": "row 3", "c.parquet": "row 3", "d": "row 3",
        "e.csv": "row 4 (the header is row 1)",
    }  # fmt: skip
    for name, place in places.items():
        path = tmp_path / name
        with pytest.raises(ForgeError) as error:
            documents(path, train_on="assistant")
        (problem,) = error.value.problems
        assert problem.found == f"{path}, {place}: 'completion' is empty"
        assert problem.fix == "fill it, or use --skip-bad-rows to leave it out"
        assert len(documents(path, train_on="assistant", skip_bad_rows=True)) == 3
