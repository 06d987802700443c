"""Mixtures keep their weights, at every place of the text."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoTokenizer

from p2p_llm_forge.data import packing, parts
from p2p_llm_forge.data import tokenizer as tokenization
from p2p_llm_forge.data.prepare import prepare
from tests.data.preparations import with_tokenizer
from tests.texts import contents, decoded_documents, stream, write_rows

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
    manifest = prepare(
        with_tokenizer(paths, tmp_path / "one", tokenizer_folder, num_workers=1, **asked)
    )
    prepare(with_tokenizer(paths, tmp_path / "two", tokenizer_folder, num_workers=3, **asked))
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


def test_a_mixture_keeps_text_given_for_validation_whole_and_once(tmp_path, tokenizer_folder):
    for name in "abv":
        text = "\n\n".join(f"{name} text {n} of peers" for n in range(50))
        (tmp_path / f"{name}.txt").write_text(text)
    paths = [f"{tmp_path}/a.txt:0.9", f"{tmp_path}/b.txt:0.1"]
    held_out = {"validation_path": [str(tmp_path / "v.txt")]}
    asked = with_tokenizer(paths, tmp_path / "out", tokenizer_folder, **held_out)
    facts = prepare(asked).splits
    assert facts["validation"].documents == 50 and not facts["validation"].left_out_tokens
    assert facts["train"].documents < 100
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder)
    held_out = [
        token
        for text in (tmp_path / "v.txt").read_text().split("\n\n")
        for token in [*tokenizer(text)["input_ids"], tokenizer.eos_token_id]
    ]
    found = stream(tmp_path / "out", "validation")
    assert found == held_out[: len(found)] and len(held_out) - len(found) < 8
    documents = decoded_documents(tmp_path / "out", "train")
    assert {document[0] for document in documents} == {"a", "b"}


def test_a_tokenizer_does_not_tell_how_it_was_reached(tmp_path, tokenizer_folder):
    tokenizer = tokenization.load_tokenizer(str(tokenizer_folder))
    tokenizer.save_pretrained(tmp_path)
    settings = (tmp_path / "tokenizer_config.json").read_text()
    assert "eos_token" in settings
    assert "local_files_only" not in settings and "is_local" not in settings
