"""prepare_data.py: nothing lost, the same bytes again, mistakes told clearly."""

from __future__ import annotations

import json
import random
import re
import subprocess
import sys
from pathlib import Path

import datasets
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

import prepare_data
from p2p_llm_forge.config import PrepareConfig
from p2p_llm_forge.data import blocks, fast_path, parts, sources
from p2p_llm_forge.data.dataset import Manifest, looks_like_prepared, open_prepared
from p2p_llm_forge.data.parts import ReadOptions
from p2p_llm_forge.errors import ForgeError
from prepare_data import prepare
from tests.texts import contents, decoded_documents, some_text, stream

SCRIPT = Path(prepare_data.__file__)


@pytest.fixture(scope="module")
def text_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "corpus.txt"
    path.write_bytes(some_text().encode())
    return path


@pytest.fixture(scope="module")
def prepared(text_file, tmp_path_factory):
    folder = tmp_path_factory.mktemp("prepared") / "a"
    prepare(config(text_file, folder))
    return folder


@pytest.fixture
def small_pieces(monkeypatch):
    """Many pieces of work, record batches and files, of which a small text would have one."""
    monkeypatch.setattr(parts, "PIECE_BYTES", 3_000)
    monkeypatch.setattr(blocks, "BATCH_BYTES", 1_000)
    monkeypatch.setattr(blocks, "BATCHES_PER_SHARD", 4)


def config(text: Path, folder: Path, **changes) -> PrepareConfig:
    asked = {"dataset_path": [str(text)], "output_dir": str(folder), "sequence_length": 32}
    return PrepareConfig(**asked | {"vocab_size": 400, "validation_fraction": 0.2} | changes)


def expected_documents(text: str) -> list[str]:
    return [d for piece in re.split(r"(?:\r?\n){2,}", text) if (d := piece.strip("\r\n"))]


# --- what comes out -------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["fast", "reference"])
def test_decoding_the_blocks_gives_the_documents_back(
    text_file, tmp_path, small_pieces, backend, capsys
):
    manifest = prepare(config(text_file, tmp_path / "a", tokenizer_backend=backend))
    expected = expected_documents(text_file.read_bytes().decode())
    assert len(sources.find([str(text_file)], ReadOptions(piece_bytes=3_000)).parts) > 5, (
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


def test_the_manifest_counts_what_the_blocks_hold(text_file, prepared):
    manifest = Manifest.load(prepared)
    tokenizer = AutoTokenizer.from_pretrained(prepared / "tokenizer")
    documents = expected_documents(text_file.read_bytes().decode())
    all_tokens = sum(
        len(tokenizer(d, split_special_tokens=True)["input_ids"]) + 1 for d in documents
    )
    assert sum(f.documents for f in manifest.splits.values()) == len(documents)
    assert sum(f.tokens + f.dropped_tokens for f in manifest.splits.values()) == all_tokens
    for split, facts in manifest.splits.items():
        tokens = stream(prepared, split)
        assert facts.tokens == len(tokens) == facts.blocks * 32
        # Each character of a byte-level token is a byte of text; EOS is none.
        text = [token for token in tokens if token != tokenizer.eos_token_id]
        assert facts.bytes == sum(map(len, tokenizer.convert_ids_to_tokens(text)))
    assert manifest.vocab_size == len(tokenizer) == 400
    assert manifest.eos_token_id == tokenizer.eos_token_id
    assert manifest.dtype == "uint16"


def test_no_text_can_end_its_document(text_file, prepared):
    assert "<|endoftext|>" in text_file.read_text()
    assert any("<|endoftext|>" in d for d in decoded_documents(prepared, "train"))
    manifest = Manifest.load(prepared)
    ends = stream(prepared, "train").count(manifest.eos_token_id)
    assert 0 <= manifest.splits["train"].documents - ends <= 5


def test_the_dataset_is_the_contract(prepared):
    assert {path.name for path in prepared.iterdir()} == {
        "dataset_dict.json", "manifest.json", "tokenizer", "train", "validation",
    }  # fmt: skip
    loaded = datasets.load_from_disk(str(prepared))
    assert isinstance(loaded, datasets.DatasetDict)
    for split in loaded.values():
        assert split.column_names == ["input_ids"]
        assert split.features["input_ids"].length == 32
        assert split.features["input_ids"].feature.dtype == "uint16"
    opened = open_prepared(prepared)
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


def test_without_validation_there_is_one_split(text_file, tmp_path):
    manifest = prepare(config(text_file, tmp_path / "a", validation_fraction=0))
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


def test_the_tokenizer_is_trained_without_the_held_out_documents(tmp_path, small_pieces):
    path = tmp_path / "text.txt"
    chosen = random.Random(0)
    names = ["".join(chosen.choices("bcdfgklmnprst", k=6)) for _ in range(400)]
    path.write_text("\n\n".join(f"common words and {name} " * 5 for name in names))
    prepare(config(path, tmp_path / "a", vocab_size=9_000, sequence_length=8))
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "a" / "tokenizer")
    known = {name for name in names if f"Ġ{name}" in tokenizer.get_vocab()}
    trained_on = {
        d.split()[3] for d in decoded_documents(tmp_path / "a", "train") if d.count(" ") > 3
    }
    held_out = set(names) - trained_on
    assert len(held_out) > 30 and len(known) > 200
    assert not known & held_out


# --- the same again -------------------------------------------------------------------------------


def test_the_same_text_gives_the_same_bytes_whatever_the_workers_and_the_place(
    text_file, tmp_path, small_pieces
):
    moved = tmp_path / "elsewhere" / text_file.name
    moved.parent.mkdir()
    moved.write_bytes(text_file.read_bytes())
    prepare(config(text_file, tmp_path / "one", num_workers=1))
    prepare(config(moved, tmp_path / "deep" / "three", num_workers=3))
    prepare(config(moved, tmp_path / "reference", num_workers=2, tokenizer_backend="reference"))
    first = contents(tmp_path / "one")
    assert len([name for name in first if name.endswith(".arrow")]) > 3
    assert first == contents(tmp_path / "deep" / "three") == contents(tmp_path / "reference")
    for path in (tmp_path / "one").rglob("*.json"):
        assert str(tmp_path) not in path.read_text()


def test_a_second_run_finds_the_dataset_prepared(text_file, prepared, capsys):
    before = {path: path.stat().st_mtime_ns for path in prepared.rglob("*")}
    again = prepare(config(text_file, prepared, num_workers=3))
    assert "already prepared" in capsys.readouterr().out
    assert again == Manifest.load(prepared)
    assert before == {path: path.stat().st_mtime_ns for path in prepared.rglob("*")}


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"sequence_length": 64}, "sequence_length: 32 there, 64 asked"),
        ({"seed": 1}, "seed: 0 there, 1 asked"),
        ({"vocab_size": 500}, "vocab_size: 400 there, 500 asked"),
        ({"document_separator": "---"}, "document_separator"),
    ],
)
def test_another_dataset_in_the_folder_is_not_overwritten(text_file, prepared, changes, told):
    before = contents(prepared)
    with pytest.raises(ForgeError, match=f"(?s)another dataset.*{told}.*fix: .*--overwrite"):
        prepare(config(text_file, prepared, **changes))
    assert contents(prepared) == before


def test_another_text_or_tokenizer_is_another_dataset(text_file, prepared, tmp_path):
    other = tmp_path / text_file.name
    other.write_text(some_text(seed=4))
    with pytest.raises(ForgeError, match="another text"):
        prepare(config(other, prepared))
    with pytest.raises(ForgeError, match="another tokenizer"):
        prepare(config(text_file, prepared, tokenizer=str(prepared / "tokenizer")))


def test_overwrite_replaces_the_dataset_and_nothing_else(text_file, tmp_path):
    folder, fresh = tmp_path / "a", tmp_path / "b"
    prepare(config(text_file, folder))
    (folder / "notes.md").write_text("mine")
    prepare(config(text_file, folder, validation_fraction=0, overwrite=True))
    prepare(config(text_file, fresh, validation_fraction=0))
    assert (folder / "notes.md").read_text() == "mine"
    (folder / "notes.md").unlink()
    assert contents(folder) == contents(fresh)


def test_the_tokenizer_of_a_dataset_can_prepare_another(text_file, prepared, tmp_path):
    used = config(text_file, tmp_path / "a", tokenizer=str(prepared / "tokenizer"))
    manifest = prepare(used)
    assert manifest.tokenizer_fingerprint == Manifest.load(prepared).tokenizer_fingerprint
    assert stream(tmp_path / "a", "train") == stream(prepared, "train")
    assert prepare(used) == manifest


def test_a_fast_path_that_differs_in_mid_work_is_left_for_the_tokenizer(
    text_file, prepared, tmp_path, monkeypatch, capsys, small_pieces
):
    right, calls = fast_path.require_same, []

    def differ_late(fast, reference, texts):
        calls.append(texts)
        if len(calls) == 4:
            raise fast_path.FastPathDiffers("they differ")
        right(fast, reference, texts)

    monkeypatch.setattr(fast_path, "require_same", differ_late)
    prepare(config(text_file, tmp_path / "a"))
    assert "they differ: starting again with the tokenizer itself" in capsys.readouterr().out
    prepare(config(text_file, tmp_path / "b", tokenizer_backend="reference"))
    assert contents(tmp_path / "a") == contents(tmp_path / "b")


# --- mistakes -------------------------------------------------------------------------------------


def no_file(tmp_path):
    return {"dataset_path": [str(tmp_path / "none.txt")]}, "none.txt: no such file"


def empty_file(tmp_path):
    (tmp_path / "empty.txt").touch()
    return {"dataset_path": [str(tmp_path / "empty.txt")]}, "empty.txt.*is empty"


def only_blank_lines(tmp_path):
    (tmp_path / "blank.txt").write_text("\n" * 100)
    return {"dataset_path": [str(tmp_path / "blank.txt")]}, "too short: 0 tokens.*found 0 documents"


def a_folder(tmp_path):
    return {"dataset_path": [str(tmp_path)]}, "(?s)is a folder without text.*give a glob"


def another_format(tmp_path):
    (tmp_path / "a.pdf").write_bytes(b"%PDF")
    return {"dataset_path": [str(tmp_path / "a.pdf")]}, "a.pdf: .pdf is not text"


def not_utf8(tmp_path):
    (tmp_path / "latin.txt").write_bytes("déjà vu ".encode("latin-1") * 100)
    told = "latin.txt is not UTF-8: byte 0xe9 at offset 1 .*--encoding-errors replace"
    return {"dataset_path": [str(tmp_path / "latin.txt")]}, told


def shorter_than_a_block(tmp_path):
    return {"sequence_length": 1_000_000}, "(?s)too short.*shorter --sequence-length"


def validation_shorter_than_a_block(tmp_path):
    told = "(?s)validation split is too short.*--validation-fraction"
    return {"sequence_length": 4_000, "validation_fraction": 0.01}, told


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
    told = "not empty and holds no prepared dataset"
    return {"output_dir": str(tmp_path / "mine"), "overwrite": True}, told


def unknown_tokenizer(tmp_path):
    return {"tokenizer": "nobody/nothing"}, "--tokenizer nobody/nothing could not be loaded"


def everything_at_once(tmp_path):
    told = "(?s)4 problems.*validation-fraction.*document-separator.*vocab-size.*sequence-length"
    return {
        "sequence_length": 0, "vocab_size": 2, "validation_fraction": 1.5, "document_separator": "",
    }, told  # fmt: skip


def broken_escape(tmp_path):
    return {"document_separator": "\\x"}, "(?s)--document-separator.*backslash"


@pytest.mark.parametrize(
    "mistake",
    [
        no_file, empty_file, only_blank_lines, a_folder, another_format, not_utf8,
        shorter_than_a_block, validation_shorter_than_a_block, output_is_a_file,
        output_below_a_file, output_full_of_other_things, unknown_tokenizer, everything_at_once,
        broken_escape,
    ],
)  # fmt: skip
def test_a_mistake_is_told_and_leaves_no_trace(text_file, tmp_path, mistake):
    changes, told = mistake(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(ForgeError, match="(?s)" + told):
        prepare(config(text_file, tmp_path / "out", **changes))
    assert sorted(tmp_path.rglob("*")) == before


def test_a_folder_that_may_not_be_written_is_told(text_file, tmp_path, monkeypatch):
    def refuse(*_, **__):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "mkdir", refuse)
    with pytest.raises(ForgeError, match="cannot be written: Permission denied"):
        prepare(config(text_file, tmp_path / "out"))


def test_bytes_that_are_not_utf8_can_be_replaced(tmp_path):
    path = tmp_path / "latin.txt"
    path.write_bytes("déjà vu ".encode("latin-1") * 100)
    changes = {"encoding_errors": "replace", "validation_fraction": 0, "sequence_length": 4}
    manifest = prepare(config(path, tmp_path / "a", **changes))
    [document] = decoded_documents(tmp_path / "a", "train")
    assert document.startswith("d\ufffdj\ufffd vu d")
    assert manifest.splits["train"].documents == 1


def test_a_failed_overwrite_leaves_the_old_dataset(text_file, tmp_path):
    prepare(config(text_file, tmp_path / "a"))
    before = contents(tmp_path / "a")
    with pytest.raises(ForgeError, match="too short"):
        prepare(config(text_file, tmp_path / "a", sequence_length=1_000_000, overwrite=True))
    assert contents(tmp_path / "a") == before


def test_an_interrupted_preparation_is_no_dataset_and_is_done_again(text_file, prepared, tmp_path):
    folder = tmp_path / "a"
    (folder / "unfinished" / "train").mkdir(parents=True)
    (folder / "unfinished" / "train" / "data-00000.arrow").write_bytes(b"half")
    assert looks_like_prepared(folder) and not looks_like_prepared(text_file)
    with pytest.raises(ForgeError, match="did not finish"):
        open_prepared(folder)
    prepare(config(text_file, folder))
    assert contents(folder) == contents(prepared)


def test_a_dataset_that_lost_blocks_is_told(text_file, prepared, tmp_path):
    prepare(config(text_file, tmp_path / "a"))
    manifest = json.loads((tmp_path / "a" / "manifest.json").read_text())
    manifest["splits"]["train"]["blocks"] += 1
    (tmp_path / "a" / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(ForgeError, match="blocks where the manifest promises"):
        open_prepared(tmp_path / "a").blocks("train")
    next((tmp_path / "a" / "train").glob("*.arrow")).unlink()
    with pytest.raises(ForgeError, match="cannot be read"):
        open_prepared(tmp_path / "a").blocks("train")


# --- the script -----------------------------------------------------------------------------------


def run(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(SCRIPT), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=100)


def test_the_script_prepares_what_the_function_does(text_file, prepared, tmp_path):
    done = run(
        "--dataset-path", text_file, "--output-dir", tmp_path / "a", "--sequence-length", 32,
        "--vocab-size", 400, "--validation-fraction", 0.2,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "prepared" in done.stdout
    assert contents(tmp_path / "a") == contents(prepared)


def test_the_script_tells_mistakes_without_a_traceback(tmp_path):
    done = run("--dataset-path", tmp_path / "none.txt", "--output-dir", tmp_path / "a")
    assert done.returncode == 2
    assert done.stderr.startswith("error: ") and "none.txt" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "a").exists()


def test_help_needs_no_heavy_library():
    code = f"""if True:
        import runpy, sys
        sys.argv = ["prepare_data.py", "--help"]
        try:
            runpy.run_path({str(SCRIPT)!r}, run_name="__main__")
        except SystemExit as end:
            assert end.code == 0
        heavy = {{"torch", "transformers", "datasets", "pyarrow", "numpy", "tokenizers"}}
        print("heavy:", heavy & set(sys.modules))
    """
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100, cwd=SCRIPT.parent)
    assert done.returncode == 0, done.stderr
    assert "--dataset-path" in done.stdout
    assert done.stdout.endswith("heavy: set()\n")


def test_no_arguments_at_all_is_a_clear_error():
    done = run()
    assert done.returncode == 2
    assert "--dataset-path" in done.stderr and "--output-dir" in done.stderr
    assert "Traceback" not in done.stderr
