"""Nothing is lost, the same input gives the same bytes, mistakes are named and leave no trace."""

from __future__ import annotations

import json
import re
from pathlib import Path
from unittest import mock

import datasets
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from p2p_llm_forge.config import PrepareConfig
from p2p_llm_forge.data import fast_path, parts, sources
from p2p_llm_forge.data import tokenizer as tokenization
from p2p_llm_forge.data.dataset import Manifest, open_prepared
from p2p_llm_forge.data.parts import ReadOptions
from p2p_llm_forge.data.prepare import prepare
from p2p_llm_forge.errors import ForgeError
from tests.data.preparations import config, with_tokenizer
from tests.texts import contents, decoded_documents, stream, write_rows


def expected_documents(text: str) -> list[str]:
    return [d for piece in re.split(r"(?:\r?\n){2,}", text) if (d := piece.strip("\r\n"))]


# --- what comes out -------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["fast", "reference"])
def test_decoding_the_blocks_gives_the_documents_back(
    corpus, tmp_path, small_pieces, backend, capsys
):
    manifest = prepare(config(corpus, tmp_path / "a", tokenizer_backend=backend))
    expected = expected_documents(corpus.read_bytes().decode())
    assert len(sources.find([str(corpus)], ReadOptions(piece_bytes=3_000)).parts) > 5, (
        "the text must be cut for this to say much"
    )
    position = {document: place for place, document in enumerate(expected)}
    found: list[int] = []
    for split in ("train", "validation"):
        *whole, last = decoded_documents(tmp_path / "a", split)
        places = [position[document] for document in whole]
        assert places == sorted(places) and len(places) > 50
        found += places
        # The last may be cut, even inside a character.
        rest = [d for d in expected if d.startswith(last.rstrip("\ufffd"))]
        assert rest
        found.append(position[rest[0]])
        facts = manifest.splits[split]
        assert facts.documents - len(places) in range(1, 6)
    lost = [expected[place] for place in sorted(set(range(len(expected))) - set(found))]
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "a" / "tokenizer")
    lost_tokens = sum(len(tokenizer(d, split_special_tokens=True)["input_ids"]) + 1 for d in lost)
    dropped = sum(facts.dropped_tokens for facts in manifest.splits.values())
    assert lost_tokens <= dropped < 64, "no more is lost than the tails that the manifest counts"


def test_the_manifest_counts_what_the_blocks_hold(corpus, prepared_corpus):
    manifest = Manifest.load(prepared_corpus)
    tokenizer = AutoTokenizer.from_pretrained(prepared_corpus / "tokenizer")
    documents = expected_documents(corpus.read_bytes().decode())
    all_tokens = sum(
        len(tokenizer(d, split_special_tokens=True)["input_ids"]) + 1 for d in documents
    )
    assert sum(f.documents for f in manifest.splits.values()) == len(documents)
    assert sum(f.tokens + f.dropped_tokens for f in manifest.splits.values()) == all_tokens
    for split, facts in manifest.splits.items():
        tokens = stream(prepared_corpus, split)
        assert facts.tokens == len(tokens) == facts.blocks * 32
        # Each character of a byte-level token is a byte of text; EOS is none.
        text = [token for token in tokens if token != tokenizer.eos_token_id]
        assert facts.bytes == sum(map(len, tokenizer.convert_ids_to_tokens(text)))
    assert manifest.vocab_size == len(tokenizer) == 400
    assert manifest.eos_token_id == tokenizer.eos_token_id
    assert manifest.dtype == "uint16"


def test_no_text_can_end_its_document(corpus, prepared_corpus):
    assert "<|endoftext|>" in corpus.read_text()
    assert any("<|endoftext|>" in d for d in decoded_documents(prepared_corpus, "train"))
    manifest = Manifest.load(prepared_corpus)
    ends = stream(prepared_corpus, "train").count(manifest.eos_token_id)
    assert 0 <= manifest.splits["train"].documents - ends <= 5


def test_the_dataset_is_the_contract(prepared_corpus):
    assert {path.name for path in prepared_corpus.iterdir()} == {
        "dataset_dict.json", "manifest.json", "tokenizer", "train", "validation",
    }  # fmt: skip
    loaded = datasets.load_from_disk(str(prepared_corpus))
    assert isinstance(loaded, datasets.DatasetDict)
    for split in loaded.values():
        assert split.column_names == ["input_ids"]
        assert split.features["input_ids"].length == 32
        assert split.features["input_ids"].feature.dtype == "uint16"
    opened = open_prepared(prepared_corpus)
    assert len(opened.blocks("train")) == loaded["train"].num_rows
    assert len(AutoTokenizer.from_pretrained(opened.tokenizer_dir)) == opened.manifest.vocab_size


def test_a_large_vocabulary_takes_four_bytes_a_token(tmp_path):
    words = {f"word-{number}": number for number in range(65_600)} | {"</s>": 65_600}
    backend = Tokenizer(models.WordLevel(words, unk_token="word-0"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>")
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    marked = tmp_path / "marked.txt"
    marked.write_text("word-65599 " * 200)
    manifest = prepare(
        config(marked, tmp_path / "a", tokenizer=str(tmp_path / "tokenizer"), validation_fraction=0)
    )
    assert manifest.dtype == "uint32"
    assert manifest.vocab_size == 65_601
    assert set(stream(tmp_path / "a", "train")) == {65_599}


def test_without_validation_there_is_one_split(corpus, tmp_path):
    manifest = prepare(config(corpus, tmp_path / "a", validation_fraction=0))
    assert list(manifest.splits) == ["train"]
    assert list(datasets.load_from_disk(str(tmp_path / "a"))) == ["train"]
    assert open_prepared(tmp_path / "a").blocks("validation") is None


def test_several_files_are_one_corpus_and_no_document_spans_two(tmp_path):
    (tmp_path / "a.txt").write_text("one " * 50 + "\n\ntwo " + "two " * 50)
    (tmp_path / "b.txt").write_text("three " * 50)
    prepare(
        PrepareConfig(
            dataset_path=[str(tmp_path / "a.txt"), str(tmp_path / "b.txt")],
            output_dir=str(tmp_path / "out"),
            sequence_length=2,
            vocab_size=300,
            validation_fraction=0,
        )
    )
    found = [document.split()[0] for document in decoded_documents(tmp_path / "out", "train")]
    assert found == ["one", "two", "three"]


def test_the_same_text_gives_the_same_bytes_whatever_the_workers_and_the_place(
    corpus, tmp_path, small_pieces
):
    moved = tmp_path / "elsewhere" / corpus.name
    moved.parent.mkdir()
    moved.write_bytes(corpus.read_bytes())
    prepare(config(corpus, tmp_path / "one", num_workers=1))
    prepare(config(moved, tmp_path / "deep" / "three", num_workers=3))
    prepare(config(moved, tmp_path / "reference", num_workers=2, tokenizer_backend="reference"))
    first = contents(tmp_path / "one")
    assert len([name for name in first if name.endswith(".arrow")]) > 3
    assert first == contents(tmp_path / "deep" / "three") == contents(tmp_path / "reference")
    for path in (tmp_path / "one").rglob("*.json"):
        assert str(tmp_path) not in path.read_text()


def test_a_fast_path_that_differs_in_mid_work_is_left_for_the_tokenizer(
    corpus, prepared_corpus, tmp_path, monkeypatch, capsys, small_pieces
):
    right, calls = fast_path.require_same, []

    def differ_late(fast, reference, texts):
        calls.append(texts)
        if len(calls) == 4:
            raise fast_path.FastPathDiffers("they differ")
        right(fast, reference, texts)

    monkeypatch.setattr(fast_path, "require_same", differ_late)
    prepare(config(corpus, tmp_path / "a"))
    assert "they differ: starting again with the tokenizer itself" in capsys.readouterr().out
    prepare(config(corpus, tmp_path / "b", tokenizer_backend="reference"))
    assert contents(tmp_path / "a") == contents(tmp_path / "b")


def test_bytes_that_are_not_utf8_can_be_replaced(tmp_path):
    path = tmp_path / "latin.txt"
    path.write_bytes("déjà vu ".encode("latin-1") * 100)
    changes = {"encoding_errors": "replace", "validation_fraction": 0, "sequence_length": 4}
    manifest = prepare(config(path, tmp_path / "a", **changes))
    [document] = decoded_documents(tmp_path / "a", "train")
    assert document.startswith("d\ufffdj\ufffd vu d")
    assert manifest.splits["train"].documents == 1


# --- with a tokenizer that is there ---------------------------------------------------------------


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    texts=st.lists(st.text(st.characters(exclude_categories=["Cs"]), min_size=1), min_size=3),
    piece_bytes=st.integers(1, 200),
)
def test_decoding_the_blocks_of_random_documents_gives_them_back(
    tmp_path_factory, tokenizer_folder, texts, piece_bytes
):
    folder = tmp_path_factory.mktemp("random")
    path = write_rows(folder / "a.jsonl", texts)
    with mock.patch.object(parts, "PIECE_BYTES", piece_bytes):
        manifest = prepare(
            with_tokenizer(path, folder / "out", tokenizer_folder, sequence_length=2)
        )
    tokenizer = AutoTokenizer.from_pretrained(folder / "out" / "tokenizer")
    expected = []
    for text in texts:
        expected += tokenizer(text, split_special_tokens=True)["input_ids"]
        expected.append(tokenizer.eos_token_id)
    tokens = stream(folder / "out", "train")
    dropped = manifest.splits["train"].dropped_tokens
    assert dropped <= 1 and tokens == expected[: len(expected) - dropped]
    assert decoded_documents(folder / "out", "train") == texts
    assert manifest.splits["train"].documents == len(texts)
    assert manifest.splits["train"].bytes == sum(len(text.encode()) for text in texts)


def test_a_given_validation_text_is_all_that_is_held_out(tmp_path, tokenizer_folder):
    write_rows(tmp_path / "train.jsonl", [f"train {n}" for n in range(50)])
    (tmp_path / "held.txt").write_text("\n\n".join(f"held {n}" for n in range(9)))
    asked = with_tokenizer(
        tmp_path / "train.jsonl",
        tmp_path / "out",
        tokenizer_folder,
        validation_path=[str(tmp_path / "held.txt")],
        validation_fraction=0.5,
        sequence_length=2,
    )
    manifest = prepare(asked)
    assert manifest.splits["train"].documents == 50 and manifest.splits["validation"].documents == 9
    assert decoded_documents(tmp_path / "out", "validation")[0] == "held 0"
    assert prepare(asked) == manifest


def test_a_vocabulary_that_four_bytes_cannot_number_is_refused(tmp_path, tokenizer_folder):
    path = write_rows(tmp_path / "a.jsonl", ["some text"] * 20)
    with (
        mock.patch.object(tokenization, "vocabulary_size", lambda _: 2**32 + 1),
        pytest.raises(ForgeError, match="4,294,967,297 entries, at most 4,294,967,296"),
    ):
        prepare(with_tokenizer(path, tmp_path / "out", tokenizer_folder))


def test_skipped_rows_are_counted_and_reported(tmp_path, tokenizer_folder, capsys):
    path = write_rows(tmp_path / "a.jsonl", ["some text"] * 20)
    path.write_text(path.read_text() + "{\n[]\n")
    manifest = prepare(with_tokenizer(path, tmp_path / "out", tokenizer_folder, skip_bad_rows=True))
    assert manifest.skipped_rows == 2 and manifest.splits["train"].documents == 20
    assert "2 bad rows left out" in capsys.readouterr().out


def test_a_tokenizer_without_eos_gets_one_by_the_flag(tmp_path, tokenizer_folder):
    bare = tmp_path / "bare"
    AutoTokenizer.from_pretrained(tokenizer_folder).save_pretrained(bare)
    settings = json.loads((bare / "tokenizer_config.json").read_text())
    settings.pop("eos_token")
    (bare / "tokenizer_config.json").write_text(json.dumps(settings))
    path = write_rows(tmp_path / "a.jsonl", ["some text"] * 20)
    with pytest.raises(ForgeError, match="(?s)no end-of-text token.*--eos-token"):
        prepare(with_tokenizer(path, tmp_path / "out", bare))
    known = prepare(with_tokenizer(path, tmp_path / "known", bare, eos_token="<|endoftext|>"))
    added = prepare(with_tokenizer(path, tmp_path / "added", bare, eos_token="<|the end|>"))
    assert known.vocab_size == 400 and added.vocab_size == 401 and added.eos_token_id == 400
    assert stream(tmp_path / "added", "train").count(400) >= 18
    saved = AutoTokenizer.from_pretrained(tmp_path / "added" / "tokenizer")
    assert saved.eos_token == "<|the end|>"


# --- mistakes -------------------------------------------------------------------------------------


def no_file(tmp_path):
    return {"dataset_path": [str(tmp_path / "none.txt")]}, "none.txt: no such file"


def empty_file(tmp_path):
    (tmp_path / "empty.txt").touch()
    return {"dataset_path": [str(tmp_path / "empty.txt")]}, "empty.txt.*is empty"


def only_blank_lines(tmp_path):
    (tmp_path / "blank.txt").write_text("\n" * 100)
    message = "too short: there is nothing to train on; found 0 documents, divided at.*add text"
    return {"dataset_path": [str(tmp_path / "blank.txt")]}, message


def only_bad_rows(tmp_path):
    (tmp_path / "bad.jsonl").write_text("no JSON\n" * 7)
    message = (
        r"(?s)nothing to train on; found 0 documents, one in each row; left out: 7 bad rows "
        r"\(--skip-bad-rows\)\W+fix: correct bad rows, or add text$"
    )
    return {"dataset_path": [str(tmp_path / "bad.jsonl")], "skip_bad_rows": True}, message


def only_unreadable_files(tmp_path):
    (tmp_path / "half.parquet").write_bytes(b"PAR1 and no more")
    message = "half.parquet: left out 1 file that cannot be read"
    return {"dataset_path": [str(tmp_path / "half.parquet")], "skip_bad_rows": True}, message


def a_folder(tmp_path):
    return {"dataset_path": [str(tmp_path)]}, "(?s)is a folder without text.*give a glob"


def another_format(tmp_path):
    (tmp_path / "a.pdf").write_bytes(b"%PDF")
    return {"dataset_path": [str(tmp_path / "a.pdf")]}, "a.pdf: .pdf is not text"


def not_utf8(tmp_path):
    (tmp_path / "latin.txt").write_bytes("déjà vu ".encode("latin-1") * 100)
    message = "latin.txt is not UTF-8: byte 0xe9 at offset 1 .*--encoding-errors replace"
    return {"dataset_path": [str(tmp_path / "latin.txt")]}, message


def shorter_than_a_block(tmp_path):
    return {"sequence_length": 1_000_000}, "(?s)too short.*shorter --sequence-length"


def validation_shorter_than_a_block(tmp_path):
    message = "(?s)validation split is too short.*--validation-fraction"
    return {"sequence_length": 4_000, "validation_fraction": 0.01}, message


def output_is_a_file(tmp_path):
    (tmp_path / "file").touch()
    return {"output_dir": str(tmp_path / "file")}, "is a file"


def output_below_a_file(tmp_path):
    (tmp_path / "file").touch()
    return {
        "output_dir": str(tmp_path / "file" / "a")
    }, "(?s)cannot be written.*give another folder"


def output_full_of_other_things(tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.doc").touch()
    message = "not empty and holds no prepared dataset"
    return {"output_dir": str(tmp_path / "mine"), "overwrite": True}, message


def unknown_tokenizer(tmp_path):
    return {"tokenizer": "nobody/nothing"}, "--tokenizer nobody/nothing could not be loaded"


def everything_at_once(tmp_path):
    message = "(?s)4 problems.*validation-fraction.*document-separator.*vocab-size.*sequence-length"
    return {
        "sequence_length": 0, "vocab_size": 2, "validation_fraction": 1.5, "document_separator": "",
    }, message  # fmt: skip


def broken_escape(tmp_path):
    return {"document_separator": "\\x"}, "(?s)--document-separator.*backslash"


@pytest.mark.parametrize(
    "mistake",
    [
        no_file, empty_file, only_blank_lines, only_bad_rows, only_unreadable_files,
        a_folder, another_format, not_utf8,
        shorter_than_a_block, validation_shorter_than_a_block, output_is_a_file,
        output_below_a_file, output_full_of_other_things, unknown_tokenizer, everything_at_once,
        broken_escape,
    ],
)  # fmt: skip
def test_a_mistake_is_named_and_leaves_no_trace(corpus, tmp_path, mistake):
    changes, message = mistake(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(ForgeError, match="(?s)" + message):
        prepare(config(corpus, tmp_path / "out", **changes))
    assert sorted(tmp_path.rglob("*")) == before


def test_a_folder_that_may_not_be_written_is_an_error(corpus, tmp_path, monkeypatch):
    def refuse(*_, **__):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "mkdir", refuse)
    with pytest.raises(ForgeError, match="cannot be written: Permission denied"):
        prepare(config(corpus, tmp_path / "out"))


def test_a_failed_overwrite_leaves_the_old_dataset(corpus, tmp_path):
    prepare(config(corpus, tmp_path / "a"))
    before = contents(tmp_path / "a")
    with pytest.raises(ForgeError, match="too short"):
        prepare(config(corpus, tmp_path / "a", sequence_length=1_000_000, overwrite=True))
    assert contents(tmp_path / "a") == before
