"""Duplicates are left out: the first is kept, and what is held out is never trained on."""

from __future__ import annotations

import json
import random
import unicodedata
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from transformers import AutoTokenizer

from p2p_llm_forge.data.dataset import Manifest
from p2p_llm_forge.data.describe import describe
from p2p_llm_forge.data.duplicates import Verdict, verdicts
from p2p_llm_forge.data.prepare import prepare
from p2p_llm_forge.data.unfinished import Ranks
from tests.data.preparations import BEFORE_PACKING, config, with_tokenizer
from tests.texts import contents, decoded_documents, write_rows

pytestmark = pytest.mark.usefixtures("small_pieces")


def key_of(text: str) -> str:
    return " ".join(unicodedata.normalize("NFC", text).split())


def without_repetitions(texts: list[str], seen: set[str]) -> list[str]:
    """The texts that were not seen before, in a plain loop."""
    kept = []
    for text in texts:
        if key_of(text) not in seen:
            seen.add(key_of(text))
            kept.append(text)
    return kept


def test_the_first_of_each_key_is_kept_but_what_is_held_out_goes_before():
    chosen = random.Random(1)
    keys = np.array([[chosen.randrange(40), chosen.randrange(3)] for _ in range(500)], np.uint64)
    keys[:, 0] += np.uint64(2**64 - 20)  # wraps around: large ones too
    found, seen = [], {}
    for row, key in enumerate(map(tuple, keys.tolist())):
        verdict = Verdict.KEPT
        if key in seen:
            verdict = Verdict.HELD_OUT_TOO if row >= 60 > seen[key] else Verdict.REPEATED
        seen.setdefault(key, row)
        found.append(verdict)
    assert {*found} == {*Verdict}
    assert verdicts(keys, held_out=60).tolist() == found
    assert verdicts(keys[:0], held_out=0).tolist() == []


def many_texts(count: int, seed: int) -> list[str]:
    """Documents of which a third repeats others, some with other white space or composition."""
    chosen = random.Random(seed)
    texts = [f"Belge {n}: öğrenciler {chosen.randrange(10**6)} okudu." for n in range(count)]
    for _ in range(count // 2):
        text = chosen.choice(texts)
        change = chosen.choice([str, "  {}\t".format, lambda t: unicodedata.normalize("NFD", t)])
        texts.insert(
            chosen.randrange(len(texts)), change(text).replace(" ", chosen.choice(" \u2003"))
        )
    return texts


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Text of two files that share documents, and some to hold out that shares with both."""
    folder = tmp_path_factory.mktemp("repeating")
    texts = many_texts(400, seed=2)
    write_rows(folder / "a.jsonl", texts[:350])
    write_rows(folder / "b.jsonl.gz", texts[250:])
    write_rows(folder / "held.jsonl", texts[::9] + many_texts(30, seed=3) + texts[::27])
    return folder


@pytest.fixture(scope="module")
def texts():
    """What the files hold, in order: to train on, and to hold out."""
    texts = many_texts(400, seed=2)
    return texts[:350] + texts[250:], texts[::9] + many_texts(30, seed=3) + texts[::27]


def documents(out, split, manifest) -> list[str]:
    """The documents of a split; the tail that fills no block may lack the last."""
    found = decoded_documents(out, split)
    assert manifest.splits[split].documents - len(found) in (0, 1)
    return found


def test_exact_duplicates_are_left_out_across_files_and_splits(
    folder, texts, tmp_path, tokenizer_folder, capsys
):
    paths = [str(folder / "a.jsonl"), str(folder / "b.jsonl.gz")]
    held = {"validation_path": [str(folder / "held.jsonl")], "deduplicate": "exact"}
    out = tmp_path / "out"
    manifest = prepare(with_tokenizer(paths, out, tokenizer_folder, **held))
    seen: set[str] = set()
    to_train, to_hold_out = texts
    held_out = without_repetitions(to_hold_out, seen)
    leaked = [text for text in to_train if key_of(text) in seen]
    train = without_repetitions(to_train, seen)
    assert len(leaked) > 20 and 100 < len(train) < len(to_train) / 2
    for split, right in (("train", train), ("validation", held_out)):
        assert manifest.splits[split].documents == len(right)
        found = documents(out, split, manifest)
        assert found[:-1] == right[: len(found) - 1], "the first of each, in order, as it was"
        counts, tail = manifest.splits[split], sum(len(text.encode()) for text in right)
        assert tail - 60 < counts.bytes <= tail
    left_out = manifest.left_out
    assert left_out["held_out_too"].documents == len(leaked)
    assert left_out["held_out_too"].bytes == sum(len(text.encode()) for text in leaked)
    repeated = len(to_train) + len(to_hold_out) - len(train) - len(held_out) - len(leaked)
    assert left_out["repeated"].documents == repeated > 100
    from_a = len(without_repetitions(to_train[:350], {key_of(text) for text in to_hold_out}))
    found = [(source.documents, source.left_out_documents) for source in manifest.sources]
    assert sum(documents for documents, _ in found) == len(train)
    assert [out for _, out in found] == [350 - from_a, len(to_train) - 350 - len(train) + from_a]
    said = f"{repeated} documents repeating or resembling an earlier one"
    assert said in capsys.readouterr().out and said in describe(out)


def test_what_a_seed_holds_out_is_not_trained_on(folder, texts, tmp_path, tokenizer_folder):
    asked = {"validation_fraction": 0.2, "deduplicate": "exact"}
    paths = [str(folder / "a.jsonl"), str(folder / "b.jsonl.gz")]
    how = with_tokenizer(paths, tmp_path / "out", tokenizer_folder, **asked)
    manifest = prepare(how)
    train = documents(tmp_path / "out", "train", manifest)
    held_out = documents(tmp_path / "out", "validation", manifest)
    keys = [key_of(text) for text in train[:-1] + held_out[:-1]]
    assert len(keys) == len(set(keys)) and len(held_out) > 60
    distinct = {key_of(text) for text in texts[0]}
    assert sum(facts.documents for facts in manifest.splits.values()) == len(distinct)
    # Without the flag the same documents would be held out, but for those that repeat.
    plain = {"validation_fraction": 0.2}
    prepare(with_tokenizer(paths, tmp_path / "plain", tokenizer_folder, **plain))
    chosen = {key_of(text) for text in decoded_documents(tmp_path / "plain", "validation")}
    assert {key_of(text) for text in held_out[:-1]} <= chosen


@pytest.mark.parametrize("kind", ["exact", "near"])
def test_workers_ranks_and_mixtures_give_the_same_bytes(folder, tmp_path, tokenizer_folder, kind):
    paths = [f"{folder}/a.jsonl:0.5", f"{folder}/b.jsonl.gz:0.5"]
    asked = {"deduplicate": kind, "validation_fraction": 0.1, "num_workers": 1}
    one = with_tokenizer(paths, tmp_path / "one", tokenizer_folder, **asked)
    manifest = prepare(one)
    prepare(with_tokenizer(paths, tmp_path / "two", tokenizer_folder, **asked | {"num_workers": 3}))
    three = with_tokenizer(paths, tmp_path / "three", tokenizer_folder, **asked)
    with ThreadPoolExecutor(3) as pool:
        for done in [pool.submit(prepare, three, Ranks(rank, 3)) for rank in range(3)]:
            assert done.result() == manifest
    assert contents(tmp_path / "one") == contents(tmp_path / "two") == contents(tmp_path / "three")
    found = [key_of(text) for text in documents(tmp_path / "one", "train", manifest)[:-1]]
    assert len(found) == len(set(found)) > 50
    assert Manifest.load(tmp_path / "one").left_out["repeated"].documents > 100
    # Shares are of what is left, not of what was there.
    tokens = [source.tokens for source in manifest.sources]
    assert tokens[0] / sum(tokens) == pytest.approx(0.5, abs=0.02)
    assert min(source.left_out_documents for source in manifest.sources) > 50


def test_bad_rows_and_lengths_come_before_duplicates(tmp_path, tokenizer_folder):
    texts = many_texts(100, seed=8) + [f"kısa {n % 7}" for n in range(40)] + ["a  b " * 99] * 3
    rows = [json.dumps({"text": text}) for text in texts]
    rows[5:5] = rows[60:60] = ["{", '{"text": 3}']
    path = tmp_path / "a.jsonl"
    path.write_text("\n".join(rows))
    asked = {"skip_bad_rows": True, "min_document_tokens": 8, "max_document_tokens": 150}
    out = tmp_path / "out"
    asked |= {"deduplicate": "exact"}
    manifest = prepare(with_tokenizer(path, out, tokenizer_folder, **asked))
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder)
    lengths = [len(tokenizer(text)["input_ids"]) for text in texts]
    fitting = [text for text, n in zip(texts, lengths, strict=True) if 8 <= n <= 150]
    kept = without_repetitions(fitting, set())
    assert manifest.skipped_rows == 4 and manifest.splits["train"].documents == len(kept) > 90
    assert documents(out, "train", manifest)[:-1] == kept[:-1]
    found = {why: counts.documents for why, counts in manifest.left_out.items()}
    short, long = sum(n < 8 for n in lengths), sum(n > 150 for n in lengths)
    repeated = len(fitting) - len(kept)
    right = {"too_short": short, "too_long": long, "repeated": repeated, "held_out_too": 0}
    assert {why: found[why] for why in right} == right and min(short, long, repeated) >= 3


def pair(chosen: random.Random, replaced: int) -> tuple[str, str]:
    """A text of 300 words, and the same with some of them replaced."""
    one = [f"w{chosen.randrange(10**5)}" for _ in range(300)]
    other = list(one)
    for place in chosen.sample(range(300), replaced):
        other[place] = f"v{chosen.randrange(10**5)}"
    return " ".join(one), " ".join(other)


def jaccard(one: str, other: str) -> float:
    """The share of their runs of five words that both have."""
    of_one, of_other = (
        {tuple(text.split()[at : at + 5]) for at in range(len(text.split()) - 4)}
        for text in (one, other)
    )
    return len(of_one & of_other) / len(of_one | of_other)


def test_near_duplicates_are_left_out_and_others_stay(tmp_path, tokenizer_folder):
    chosen = random.Random(4)
    pairs = [pair(chosen, replaced) for replaced in [*range(0, 4), *range(20, 60, 4)] * 4]
    alike = [jaccard(*both) for both in pairs]
    near = [similarity > 0.89 for similarity in alike]
    assert 10 < sum(near) < 40 and max(s for s in alike if s <= 0.89) < 0.62
    train = [one for one, _ in pairs[:40]] + [other for _, other in pairs]
    held_out = [one for one, _ in pairs[40:]]
    write_rows(tmp_path / "train.jsonl", train)
    write_rows(tmp_path / "held.jsonl", held_out)
    path, held = tmp_path / "train.jsonl", {"validation_path": [str(tmp_path / "held.jsonl")]}
    for name, workers in (("one", 1), ("two", 3)):
        how = held | {"deduplicate": "near", "num_workers": workers}
        manifest = prepare(with_tokenizer(path, tmp_path / name, tokenizer_folder, **how))
    assert contents(tmp_path / "one") == contents(tmp_path / "two")
    assert not list(tmp_path.rglob("keys"))
    right = train[:40] + [train[40 + n] for n, is_near in enumerate(near) if not is_near]
    assert documents(tmp_path / "one", "train", manifest)[:-1] == right[:-1]
    assert manifest.splits["train"].documents == len(right)
    assert manifest.splits["validation"].documents == len(held_out)
    assert manifest.left_out["repeated"].documents == sum(near[:40]) > 5
    assert manifest.left_out["held_out_too"].documents == sum(near[40:]) > 2


def test_many_documents_that_share_a_band_are_compared_with_several(tmp_path):
    chosen = np.random.default_rng(1)
    families = chosen.integers(0, 2**16, (10, 128), dtype=np.uint16)
    families[:, :8] = 7  # of one band, and no two alike
    rows = chosen.permutation(np.repeat(np.arange(10), 5))
    found = verdicts(np.ascontiguousarray(families[rows]).view(np.uint64), held_out=0)
    seen: set[int] = set()
    for row, verdict in zip(rows.tolist(), found.tolist(), strict=True):
        assert (verdict == Verdict.REPEATED) == (row in seen)
        seen.add(row)


@pytest.mark.slow
def test_killed_at_random_moments_it_leaves_out_the_same(zygote, folder, tmp_path):
    whole = tmp_path / "whole"
    manifest = prepare(config(folder, whole, deduplicate="exact", num_workers=1))
    assert manifest.left_out["repeated"].documents > 100
    words, log = [str(folder), str(tmp_path / "out"), "12", "exact"], tmp_path / "log"
    pid = zygote.start(words, log, script="tests.data.killed_again_and_again")
    assert zygote.wait(pid) == 0, log.read_text()
    killed, finished, after_some_pieces = map(int, log.read_text().split())
    assert killed >= 12 and finished >= 1 and after_some_pieces >= 3
    for number in range(finished):
        assert contents(tmp_path / "out" / str(number)) == contents(whole)


@pytest.mark.parametrize("kind", ["exact", "near"])
def test_what_was_noted_of_documents_and_damaged_is_noted_again(folder, tmp_path, kind):
    prepare(config(folder, tmp_path / "whole", deduplicate=kind))
    asked = config(folder, tmp_path / "out", deduplicate=kind)
    with BEFORE_PACKING, pytest.raises(KeyboardInterrupt):
        prepare(asked)
    notes = sorted((tmp_path / "out" / "unfinished" / "pieces").glob("*.documents"))
    assert len(notes) > 10
    notes[2].write_bytes(b"\0" * notes[2].stat().st_size)
    notes[4].write_bytes(notes[4].read_bytes()[:-8])
    notes[6].unlink()
    prepare(asked)
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")
