"""Mixtures keep their weights, and blocks give random documents back."""

from __future__ import annotations

import json
from pathlib import Path
from unittest import mock

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from p2p_llm_forge.config import PrepareConfig
from p2p_llm_forge.data import encode, packing, parts, tokenizer_training
from p2p_llm_forge.data import tokenizer as tokenization
from p2p_llm_forge.data.preparation import Preparation
from p2p_llm_forge.errors import ForgeError
from prepare_data import prepare
from tests.texts import contents, decoded_documents, some_text, stream, write_rows


@pytest.fixture(scope="module")
def tokenizer_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    tokenization.train_tokenizer(some_text(100).split("\n\n"), 400).save_pretrained(folder)
    return folder


def config(path: object, folder: Path, tokenizer: Path, **changes) -> PrepareConfig:
    paths = path if isinstance(path, list) else [str(path)]
    asked = {"dataset_path": paths, "output_dir": str(folder), "tokenizer": str(tokenizer)}
    return PrepareConfig(**asked | {"sequence_length": 8, "validation_fraction": 0.0} | changes)


# --- documents in, documents out ------------------------------------------------------------------


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
        manifest = prepare(config(path, folder / "out", tokenizer_folder, sequence_length=2))
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


# --- mixtures -------------------------------------------------------------------------------------


def test_quotas_hold_the_weights_and_use_up_the_scarce_source():
    assert packing.quotas([1000, 1000], (0.7, 0.3)) == [1000, 429]
    assert packing.quotas([100, 1000], (0.5, 0.5)) == [100, 100]
    assert packing.quotas([300, 100], (0.75, 0.25)) == [300, 100]
    assert packing.quotas([0, 100], (0.5, 0.5)) == [0, 0]


@given(
    st.lists(st.lists(st.integers(1, 50), min_size=1, max_size=30), min_size=2, max_size=4),
    st.data(),
)
def test_a_blend_stays_near_its_weights_at_every_place(sizes, data):
    weights = [data.draw(st.integers(1, 9)) for _ in sizes]
    shares = tuple(weight / sum(weights) for weight in weights)
    limits = packing.quotas([sum(size) for size in sizes], shares)
    if not min(limits):
        return
    order = packing.blended(sizes, limits)
    assert sorted(set(order)) == sorted(order)
    given_tokens = [0] * len(sizes)
    for source, place in order:
        others = [given_tokens[s] / limits[s] for s in range(len(sizes))]
        assert given_tokens[source] / limits[source] == min(
            share for share, size, limit, g in zip(others, sizes, limits, given_tokens, strict=True)
            if g < limit
        )  # fmt: skip
        given_tokens[source] += sizes[source][place]
    assert all(g >= limit for g, limit in zip(given_tokens, limits, strict=True))


def test_a_mixture_has_its_weights_by_tokens_and_is_deterministic(
    tmp_path, tokenizer_folder, monkeypatch
):
    monkeypatch.setattr(parts, "PIECE_BYTES", 2_000)
    rows = [f"A row {n} " + "with some words " * (n % 9) for n in range(400)]
    write_rows(tmp_path / "a.jsonl", rows)
    (tmp_path / "b.txt").write_text("\n\n".join(f"B text {n}" + " of peers" * 9 for n in range(90)))
    paths = [f"{tmp_path}/a.jsonl:0.7", f"{tmp_path}/b.txt:0.3"]
    asked = {"validation_fraction": 0.2}
    manifest = prepare(config(paths, tmp_path / "one", tokenizer_folder, num_workers=1, **asked))
    prepare(config(paths, tmp_path / "two", tokenizer_folder, num_workers=3, **asked))
    assert contents(tmp_path / "one") == contents(tmp_path / "two")
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder)
    documents = decoded_documents(tmp_path / "one", "train")
    size = {"A": 0, "B": 0}
    for document in documents:
        size[document[0]] += len(tokenizer(document)["input_ids"]) + 1
    assert size["A"] / sum(size.values()) == pytest.approx(0.7, abs=0.01)
    facts = manifest.splits["train"]
    assert facts.left_out_tokens > 100 and facts.documents - len(documents) in (0, 1)
    text_bytes = sum(len(document.encode()) for document in documents)
    assert facts.bytes == pytest.approx(text_bytes, abs=1)
    third = [{d[0] for d in documents[n : n + 60]} for n in range(0, len(documents) - 60, 60)]
    assert all(names == {"A", "B"} for names in third), "sources take turns"
    held_out = {document[0] for document in decoded_documents(tmp_path / "one", "validation")}
    assert held_out == {"A", "B"} and not manifest.splits["validation"].left_out_tokens


# --- other ways of asking -------------------------------------------------------------------------


def test_a_given_validation_text_is_all_that_is_held_out(tmp_path, tokenizer_folder):
    write_rows(tmp_path / "train.jsonl", [f"train {n}" for n in range(50)])
    (tmp_path / "held.txt").write_text("\n\n".join(f"held {n}" for n in range(9)))
    asked = config(
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


def test_a_tokenizer_without_eos_gets_one_by_the_flag(tmp_path, tokenizer_folder):
    bare = tmp_path / "bare"
    AutoTokenizer.from_pretrained(tokenizer_folder).save_pretrained(bare)
    settings = json.loads((bare / "tokenizer_config.json").read_text())
    settings.pop("eos_token")
    (bare / "tokenizer_config.json").write_text(json.dumps(settings))
    path = write_rows(tmp_path / "a.jsonl", ["some text"] * 20)
    with pytest.raises(ForgeError, match="(?s)no end-of-text token.*--eos-token"):
        prepare(config(path, tmp_path / "out", bare))
    known = prepare(config(path, tmp_path / "known", bare, eos_token="<|endoftext|>"))
    added = prepare(config(path, tmp_path / "added", bare, eos_token="<|the end|>"))
    assert known.vocab_size == 400 and added.vocab_size == 401 and added.eos_token_id == 400
    assert stream(tmp_path / "added", "train").count(400) >= 18
    saved = AutoTokenizer.from_pretrained(tmp_path / "added" / "tokenizer")
    assert saved.eos_token == "<|the end|>"


def test_a_tokenizer_does_not_tell_how_it_was_reached(tmp_path, tokenizer_folder):
    tokenizer = tokenization.load_tokenizer(str(tokenizer_folder))
    tokenizer.save_pretrained(tmp_path)
    settings = (tmp_path / "tokenizer_config.json").read_text()
    assert "eos_token" in settings
    assert "local_files_only" not in settings and "is_local" not in settings


def test_a_vocabulary_that_four_bytes_cannot_number_is_refused(tmp_path, tokenizer_folder):
    path = write_rows(tmp_path / "a.jsonl", ["some text"] * 20)
    with (
        mock.patch.object(tokenization, "vocabulary_size", lambda _: 2**32 + 1),
        mock.patch.object(encode, "control_token_guard", lambda _: None),
        pytest.raises(ForgeError, match="4,294,967,297 entries, at most 4,294,967,296"),
    ):
        prepare(config(path, tmp_path / "out", tokenizer_folder))


def test_skipped_rows_are_counted_and_reported(tmp_path, tokenizer_folder, capsys):
    path = write_rows(tmp_path / "a.jsonl", ["some text"] * 20)
    path.write_text(path.read_text() + "{\n[]\n")
    manifest = prepare(config(path, tmp_path / "out", tokenizer_folder, skip_bad_rows=True))
    assert manifest.skipped_rows == 2 and manifest.splits["train"].documents == 20
    assert "2 bad rows left out" in capsys.readouterr().out


def test_a_tokenizer_for_a_large_text_is_trained_on_some_of_it_always_the_same(
    tmp_path, monkeypatch
):
    monkeypatch.setattr(parts, "PIECE_BYTES", 2_000)
    monkeypatch.setattr(tokenizer_training, "TRAINING_BYTES", 20_000)
    (tmp_path / "a.txt").write_text(some_text(1_000))
    asked = PrepareConfig([str(tmp_path / "a.txt")], str(tmp_path), vocab_size=400)
    found = Preparation.of(asked)
    first = list(tokenizer_training.training_text(found))
    assert first == list(tokenizer_training.training_text(found))
    assert 8_000 < len("".join(first).encode()) < 40_000 < (tmp_path / "a.txt").stat().st_size
