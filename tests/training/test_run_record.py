"""run.json names what a run has written; no content of it is more than a message."""

from __future__ import annotations

import json
import os
import shutil

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from p2p_llm_forge.errors import ForgeError
from p2p_llm_forge.training.identity import claim, recorded_identity, refuse_another_run
from p2p_llm_forge.training.run_record import RUN, UNRECORDED, RunRecord, put_on_record
from tests.json_values import VALUES


def test_what_is_put_on_record_is_found_there(tmp_path):
    assert RunRecord.read(tmp_path) is None and put_on_record(tmp_path, ["a"]) == frozenset()
    assert not (tmp_path / RUN).exists(), "a folder without a run gets no record"
    RunRecord({"seed": 3}, frozenset(["a"])).write(tmp_path)
    assert put_on_record(tmp_path, ["b"]) == {"a"}
    assert RunRecord.read(tmp_path) == RunRecord({"seed": 3}, frozenset(["a", "b"]))


def test_checkpoints_that_are_gone_leave_the_record(tmp_path):
    RunRecord({}, frozenset(["checkpoint-2", "checkpoint-4", "metrics.jsonl"])).write(tmp_path)
    (tmp_path / "checkpoint-4").mkdir()
    put_on_record(tmp_path, ["checkpoint-6"])
    expected = {"checkpoint-4", "checkpoint-6", "metrics.jsonl"}
    assert RunRecord.read(tmp_path).wrote == expected


def test_a_record_of_an_earlier_version_names_what_that_wrote(tmp_path):
    (tmp_path / RUN).write_text('{"format_version": 1, "identity": {}}')
    assert RunRecord.read(tmp_path).wrote == set(UNRECORDED)


@pytest.mark.parametrize(
    "content",
    [
        *("", "{", "[]", "null", "5", '{"identity": {}}', "[" * 200_000),
        *('{"format_version": 1}', '{"format_version": 1, "identity": []}'),
        '{"format_version": 2, "identity": {}}',
        '{"format_version": 1, "identity": {}, "wrote": {}}',
        *(
            json.dumps({"format_version": 1, "identity": {}, "wrote": [name]})
            for name in ("..", "", "a/b", "/etc", "a\\b", "a\0", 5, None)
        ),
        b"\xff\xfe",
    ],
    ids=lambda content: ascii(content)[:40],
)
def test_a_record_that_is_none_of_ours_is_refused(tmp_path, content):
    (tmp_path / RUN).write_bytes(content if isinstance(content, bytes) else content.encode())
    for use in (
        lambda: recorded_identity(tmp_path),
        lambda: refuse_another_run(tmp_path, {}, True, False),
        lambda: claim(tmp_path, {}, overwrite=True),
    ):
        with pytest.raises(ForgeError, match=r"run\.json cannot be read") as error:
            use()
        assert "--overwrite" not in error.value.problems[0].fix, "it could not know what is ours"
    assert os.listdir(tmp_path) == [RUN]


@pytest.mark.parametrize("kind", ["a folder", "a link to nowhere", "a link to itself"])
def test_a_record_that_is_no_file_is_refused(tmp_path, kind):
    if kind == "a folder":
        (tmp_path / RUN).mkdir()
    else:
        (tmp_path / RUN).symlink_to("nowhere" if "nowhere" in kind else RUN)
    with pytest.raises(ForgeError, match=r"run\.json cannot be read"):
        RunRecord.read(tmp_path)


@settings(
    max_examples=300,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(
    version=st.just(1) | VALUES,
    identity=st.dictionaries(st.sampled_from(["seed", "batch_size", "dataset"]), VALUES) | VALUES,
    wrote=st.lists(st.text(max_size=6)) | VALUES,
    resume=st.booleans(),
)
def test_no_record_is_more_than_a_message(tmp_path_factory, version, identity, wrote, resume):
    folder = tmp_path_factory.mktemp("run")
    content = {"format_version": version, "identity": identity, "wrote": wrote}
    (folder / RUN).write_text(json.dumps(content))
    (folder / "notes.txt").write_text("mine")
    try:
        refuse_another_run(folder, {"seed": 3, "batch_size": 8}, resume, False)
    except ForgeError as error:
        str(error).encode()
    finally:
        assert (folder / "notes.txt").read_text() == "mine"
        shutil.rmtree(folder)
