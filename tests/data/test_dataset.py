"""A folder is a prepared dataset only with a good manifest, which identifies its blocks."""

from __future__ import annotations

import hashlib
import json
import tempfile
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from p2p_llm_forge.data.dataset import (
    Manifest,
    SourceFacts,
    SplitFacts,
    looks_like_prepared,
    open_prepared,
    publish,
)
from p2p_llm_forge.data.prepare import prepare
from p2p_llm_forge.errors import ForgeError
from tests.data.preparations import config
from tests.json_values import VALUES
from tests.texts import contents, write_manifest


def a_manifest(**changes) -> Manifest:
    facts = {"train": SplitFacts(documents=3, blocks=2, tokens=16, bytes=50, dropped_tokens=1)}
    content = {
        "sequence_length": 8,
        "vocab_size": 300,
        "eos_token_id": 0,
        "dtype": "uint16",
        "splits": facts,
        "tokenizer_fingerprint": "t",
        "content_fingerprint": "c",
        "arguments": {"dataset_path": ["a.txt"], "seed": 0},
    }
    return Manifest(**content | changes)


def test_a_manifest_comes_back_as_it_was_saved(tmp_path):
    (tmp_path / "dataset_dict.json").write_text("{}")
    saved = a_manifest().save(tmp_path)
    assert Manifest.load(tmp_path) == saved and saved.files
    assert Manifest.load(tmp_path).fingerprint == a_manifest().fingerprint


def test_a_text_is_named_and_described_as_before_there_were_conversations(tmp_path):
    """By what the version before them has written."""
    assert a_manifest().fingerprint == (
        "84d470d5b77b9740148f6f6f67db93528d0c121e1cebde2add466d9142285b50"
    )
    (tmp_path / "dataset_dict.json").write_text("{}")
    a_manifest().save(tmp_path)
    assert hashlib.sha256((tmp_path / "manifest.json").read_bytes()).hexdigest() == (
        "60e8d28ad1f2e1ae3bc1fa4f7ee4e08014a04cd58ce4ade6fb75bc5f17a30eb9"
    )


def test_a_manifest_of_conversations_comes_back_and_names_them(tmp_path):
    facts = SplitFacts(3, 2, tokens=16, bytes=20, dropped_tokens=0, trained_tokens=9)
    of_all = a_manifest(splits={"train": facts}, conversations={"train_on": "all"})
    (tmp_path / "dataset_dict.json").write_text("{}")
    saved = of_all.save(tmp_path)
    loaded = Manifest.load(tmp_path)
    assert loaded == saved and loaded.conversations == {"train_on": "all"}
    assert loaded.splits["train"].trained_tokens == 9
    others = [
        a_manifest(),
        a_manifest(splits={"train": facts}, conversations={"train_on": "assistant"}),
        a_manifest(
            splits={"train": replace(facts, trained_tokens=8)}, conversations={"train_on": "all"}
        ),
    ]
    assert len({one.fingerprint for one in [loaded, *others]}) == 4


def test_a_manifest_of_conversations_does_not_go_with_blocks_of_text(prepared_corpus, tmp_path):
    for name in ("train", "validation", "tokenizer"):
        (tmp_path / name).symlink_to(prepared_corpus / name)
    content = json.loads((prepared_corpus / "manifest.json").read_text())
    write_manifest(tmp_path, content)
    assert open_prepared(tmp_path).train_blocks()
    write_manifest(tmp_path, content | {"conversations": {"train_on": "all"}})
    with pytest.raises(ForgeError, match="train holds text, the manifest has conversations"):
        open_prepared(tmp_path).train_blocks()


def test_every_changed_byte_of_a_manifest_is_found(tmp_path):
    (tmp_path / "dataset_dict.json").write_text("{}")
    a_manifest().save(tmp_path)
    path = tmp_path / "manifest.json"
    written = path.read_bytes()
    for place in range(len(written)):
        for changed in (bytes([written[place] ^ 1]), b"", b" " + written[place : place + 1]):
            path.write_bytes(written[:place] + changed + written[place + 1 :])
            with pytest.raises(ForgeError, match="manifest.json"):
                Manifest.load(tmp_path)
    for changed in (written[::-1], written + b"\n", written.replace(b"\n", b"\r\n")):
        path.write_bytes(changed)
        with pytest.raises(ForgeError, match="manifest.json"):
            open_prepared(tmp_path)
    write_manifest(tmp_path, json.loads(written))
    assert Manifest.load(tmp_path).splits == a_manifest().splits, "the digest is as it is described"


def test_the_fingerprint_tells_datasets_apart_and_ignores_names():
    same = a_manifest(arguments={"dataset_path": ["b.txt"], "seed": 0})
    assert same.fingerprint == a_manifest().fingerprint
    others = [
        a_manifest(sequence_length=16),
        a_manifest(tokenizer_fingerprint="u"),
        a_manifest(content_fingerprint="d"),
        a_manifest(arguments={"dataset_path": ["a.txt"], "seed": 1}),
    ]
    assert len({manifest.fingerprint for manifest in [same, *others]}) == 5


def test_weights_are_part_of_the_fingerprint_and_names_of_sources_are_not():
    def of_sources(*weights, names="ab", tokens=16):
        given = zip(names, weights, strict=True)
        return a_manifest(
            sources=[SourceFacts(name, weight, 1, 9, tokens, 0, 0) for name, weight in given]
        ).fingerprint

    mixture = of_sources(0.7, 0.3)
    assert of_sources(0.7, 0.3, names="xy") == mixture
    others = [of_sources(0.6, 0.4), of_sources(0.7, 0.3, tokens=8), of_sources(None, None)]
    assert len({mixture, *others}) == 4
    assert of_sources(None, None) == of_sources(None, names="a") == a_manifest().fingerprint


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "(?s)no manifest.json.*python prepare_data.py"),
        ("{", "cannot be read"),
        ("[]", "cannot be read"),
        ('{"format_version": 4}', "cannot be read"),
        ('{"format_version": 2}', "format version 2, this program reads 4"),
        ('{"format_version": 99}', "(?s)format version 99.*--overwrite"),
    ],
)
def test_a_folder_without_a_good_manifest_is_no_dataset(tmp_path, content, message):
    if content is not None:
        (tmp_path / "manifest.json").write_text(content)
    with pytest.raises(ForgeError, match=message):
        open_prepared(tmp_path)


@settings(
    max_examples=150,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(data=st.data())
def test_no_manifest_is_more_than_a_message(prepared_corpus, data):
    """One of its parts is replaced, removed or added to."""
    content = json.loads((prepared_corpus / "manifest.json").read_text())
    part, key = content, data.draw(st.sampled_from(sorted(content)))
    while isinstance(part[key], dict) and part[key] and data.draw(st.booleans()):
        part = part[key]
        key = data.draw(st.sampled_from(sorted(part)))
    if data.draw(st.booleans()):
        part[key] = data.draw(VALUES)
    else:
        del part[key]
    part |= data.draw(st.dictionaries(st.text(max_size=4), VALUES, max_size=1))
    with tempfile.TemporaryDirectory() as folder:
        for name in ("train", "validation", "tokenizer"):
            Path(folder, name).symlink_to(prepared_corpus / name)
        write_manifest(Path(folder), content)
        try:
            prepared = open_prepared(folder)
            assert len(prepared.train_blocks()) == prepared.manifest.splits["train"].blocks
            for split in prepared.manifest.splits:
                prepared.blocks(split)
            assert len(prepared.manifest.fingerprint) == 64
        except ForgeError as error:
            str(error).encode()


@pytest.mark.parametrize("content", [b"", b"\xff", b"[" * 200_000, b'{"format_version": 3e999}'])
def test_no_bytes_are_more_than_a_message(tmp_path, content):
    (tmp_path / "manifest.json").write_bytes(content)
    with pytest.raises(ForgeError, match="manifest.json"):
        open_prepared(tmp_path)


def test_a_dataset_of_an_earlier_version_is_refused_and_its_fix_works(corpus, tmp_path):
    prepare(config(corpus, tmp_path / "a"))
    content = json.loads((tmp_path / "a" / "manifest.json").read_text())
    content |= {"format_version": 3}
    del content["digest"]
    (tmp_path / "a" / "manifest.json").write_text(json.dumps(content, indent=2))
    with pytest.raises(ForgeError, match="format version 3, this program reads 4") as error:
        open_prepared(tmp_path / "a")
    assert error.value.problems[0].fix == "prepare the text again with --overwrite"
    with pytest.raises(ForgeError, match="format version 3, this program reads 4") as error:
        prepare(config(corpus, tmp_path / "a"))
    prepare(config(corpus, tmp_path / "a", overwrite=True))
    assert open_prepared(tmp_path / "a").train_blocks()


def test_a_folder_that_does_not_exist_is_an_error(tmp_path):
    with pytest.raises(ForgeError, match="no such folder"):
        open_prepared(tmp_path / "none")


def test_the_manifest_holds_the_size_and_the_sha256_of_every_file(tmp_path):
    (tmp_path / "train").mkdir()
    for name in ("train/data.arrow", "dataset_dict.json"):
        (tmp_path / name).write_bytes(name.encode() * 9)
    assert a_manifest().save(tmp_path) == Manifest.load(tmp_path)
    assert Manifest.load(tmp_path).files == {
        name: {
            "bytes": 9 * len(name),
            "sha256": hashlib.sha256(name.encode() * 9).hexdigest(),
        }
        for name in ("dataset_dict.json", "train/data.arrow")
    }


def test_publishing_replaces_an_older_dataset_and_nothing_else(tmp_path):
    (tmp_path / "notes.md").write_text("mine")
    for content in ("old", "new"):
        finished = tmp_path / "unfinished" / content
        (finished / "train").mkdir(parents=True)
        (finished / "train" / f"{content}.arrow").write_text(content)
        a_manifest(dtype=content).save(finished)
        publish(finished, tmp_path)
    assert Manifest.load(tmp_path).dtype == "new"
    assert [path.name for path in (tmp_path / "train").iterdir()] == ["new.arrow"]
    assert (tmp_path / "notes.md").read_text() == "mine"


def test_a_dataset_that_lost_blocks_is_an_error(corpus, tmp_path):
    prepare(config(corpus, tmp_path / "a"))
    manifest = json.loads((tmp_path / "a" / "manifest.json").read_text())
    manifest["splits"]["train"]["blocks"] += 1
    write_manifest(tmp_path / "a", manifest)
    with pytest.raises(ForgeError, match="blocks where the manifest promises"):
        open_prepared(tmp_path / "a").blocks("train")
    next((tmp_path / "a" / "train").glob("*.arrow")).unlink()
    with pytest.raises(ForgeError, match="cannot be read"):
        open_prepared(tmp_path / "a").blocks("train")


def test_an_interrupted_preparation_is_no_dataset_and_is_resumed(corpus, prepared_corpus, tmp_path):
    folder = tmp_path / "a"
    (folder / "unfinished" / "train").mkdir(parents=True)
    (folder / "unfinished" / "train" / "data-00000.arrow").write_bytes(b"half")
    assert looks_like_prepared(folder) and not looks_like_prepared(corpus)
    with pytest.raises(ForgeError, match="did not finish"):
        open_prepared(folder)
    prepare(config(corpus, folder))
    assert contents(folder) == contents(prepared_corpus)


@pytest.mark.parametrize("keep", [0, 2])
def test_a_manifest_that_does_not_name_what_is_there_has_a_fix_that_works(corpus, tmp_path, keep):
    prepare(config(corpus, tmp_path / "out"))
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    manifest["files"] = dict(list(manifest["files"].items())[:keep])
    (tmp_path / "out" / "manifest.json").write_text(json.dumps(manifest))
    before = contents(tmp_path / "out")
    with pytest.raises(ForgeError) as error:
        open_prepared(tmp_path / "out")
    assert error.value.problems[0].fix.startswith("prepare the text into a new folder")
    with pytest.raises(ForgeError, match="which no preparation has written"):
        prepare(config(corpus, tmp_path / "out", overwrite=True))
    assert contents(tmp_path / "out") == before
    prepare(config(corpus, tmp_path / "new"))


def test_a_file_is_no_dataset_and_a_folder_is_asked_for(tmp_path):
    (tmp_path / "a.txt").write_text("text")
    with pytest.raises(ForgeError, match="a.txt is a file, and a prepared dataset is a folder"):
        open_prepared(tmp_path / "a.txt")
