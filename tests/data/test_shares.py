"""Sources get the shares that are asked for; those they got are named, and missing ones found."""

from __future__ import annotations

import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import datasets
import pytest

from p2p_llm_forge.data import hub
from p2p_llm_forge.data.dataset import Manifest, SourceFacts, SplitFacts
from p2p_llm_forge.data.prepare import prepare
from p2p_llm_forge.data.shares import share_lines, share_warnings
from p2p_llm_forge.data.unfinished import Ranks
from p2p_llm_forge.errors import ForgeError
from tests.data.preparations import BEFORE_PACKING, config, make_pieces_small, with_tokenizer
from tests.data.word_tokenizers import KINDS, Documents, documents, given, save
from tests.texts import contents, write_rows


@pytest.fixture(scope="module")
def kinds(tmp_path_factory):
    """Every kind of tokenizer, and the folder where it is."""
    folder = tmp_path_factory.mktemp("kinds")
    made = {name: make() for name, make in KINDS.items()}
    return {name: (kind, save(kind, folder / name)) for name, kind in made.items()}


def rows_of(folder: Path, split: str = "train") -> list[list[int]]:
    """The blocks, as `datasets` reads them."""
    return datasets.load_from_disk(str(folder))[split]["input_ids"][:]


def check(folder: Path, sources: list[Documents], split: str = "train") -> Manifest:
    """Compare the manifest of a dataset with what is in its blocks; return it."""
    manifest = Manifest.load(folder)
    found = given(rows_of(folder, split), manifest.eos_token_id, sources)
    facts = manifest.splits[split]
    assert facts.tokens == sum(source.tokens for source in found) > 0
    assert facts.bytes == sum(source.bytes for source in found) > 0
    if split != "train":
        return manifest
    for source, kept, written in zip(found, manifest.sources, sources, strict=True):
        assert (kept.tokens, kept.bytes) == (source.tokens, source.bytes)
        assert kept.documents >= source.documents
        all_tokens = sum(len(tokens) + 1 for tokens in written.tokens.values())
        assert kept.found <= all_tokens, "some are held out"
    for name in ("tokens", "bytes", "documents", "dropped_tokens", "left_out_tokens"):
        assert getattr(facts, name) == sum(getattr(kept, name) for kept in manifest.sources)
    assert facts.dropped_tokens < manifest.sequence_length
    return manifest


@pytest.mark.parametrize("name", KINDS)
def test_bytes_and_tokens_of_a_mixture_are_those_of_its_text(name, kinds, tmp_path, small_pieces):
    kind, tokenizer = kinds[name]
    sources = [documents(kind, range(200), 40), documents(kind, range(200, 320), 400, seed=1)]
    paths = [
        write_rows(tmp_path / file, source.texts)
        for file, source in zip(("a.jsonl", "b.jsonl.gz"), sources, strict=True)
    ]
    asked = {"dataset_path": [f"{paths[0]}:3", f"{paths[1]}:1"], "validation_fraction": 0.1}
    asked |= {"output_dir": "", "sequence_length": 64}
    for workers in (1, 3):
        folder = tmp_path / f"{workers}"
        changes = asked | {"output_dir": str(folder), "num_workers": workers}
        prepare(with_tokenizer([], folder, tokenizer, **changes))
    assert contents(tmp_path / "1") == contents(tmp_path / "3")
    manifest = check(folder, sources)
    assert manifest.splits["train"].left_out_tokens > 1_000, "there is something to cut"
    shares = [source.tokens / manifest.splits["train"].tokens for source in manifest.sources]
    assert shares == pytest.approx([0.75, 0.25], abs=64 / manifest.splits["train"].tokens)
    check(folder, sources, "validation")
    with BEFORE_PACKING, pytest.raises(KeyboardInterrupt):
        prepare(with_tokenizer([], folder, tokenizer, **changes, overwrite=True))
    prepare(with_tokenizer([], folder, tokenizer, **changes, overwrite=True))
    assert contents(tmp_path / "1") == contents(tmp_path / "3"), "after an interruption"


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("length", [16, 100])
def test_bytes_of_splits_are_those_of_their_text(name, length, kinds, tmp_path):
    kind, tokenizer = kinds[name]
    source, held_out = documents(kind, range(60), 30), documents(kind, range(60, 90), 30)
    paths = [
        write_rows(tmp_path / file, one.texts)
        for file, one in (("a.csv", source), ("held.parquet", held_out))
    ]
    asked = {"validation_path": [str(paths[1])], "sequence_length": length}
    prepare(with_tokenizer(paths[0], tmp_path / "out", tokenizer, **asked))
    check(tmp_path / "out", [source])
    manifest = check(tmp_path / "out", [held_out], "validation")
    assert all(facts.dropped_tokens for facts in manifest.splits.values()), "tails are cut"


def test_a_long_document_is_cut_at_the_end_of_a_block(kinds, tmp_path, capsys):
    kind, tokenizer = kinds["word piece"]
    sources = [documents(kind, range(400), 30), documents(kind, range(900, 901), 9_000)]
    assert len(sources[1].tokens[900]) > 3_000
    for name, source in zip("ab", sources, strict=True):
        (tmp_path / f"{name}.txt").write_text("\n\n".join(source.texts))
    paths = [f"{tmp_path}/a.txt:0.7", f"{tmp_path}/b.txt:0.3"]
    prepare(with_tokenizer(paths, tmp_path / "out", tokenizer, sequence_length=32))
    manifest = check(tmp_path / "out", sources)
    long = manifest.sources[1]
    assert long.documents == 1 and long.tokens % 32 == 0 and long.left_out_tokens > 2_000
    assert long.tokens / manifest.splits["train"].tokens == pytest.approx(0.3, abs=0.02)
    assert "warning" not in capsys.readouterr().out


def test_shares_that_are_told_are_those_of_the_blocks(kinds, tmp_path, capsys):
    kind, tokenizer = kinds["unigram"]
    sources = [documents(kind, range(100), 20), documents(kind, range(100, 300), 20, seed=1)]
    paths = [
        f"{write_rows(tmp_path / f'{name}.jsonl', source.texts)}:{weight}"
        for name, source, weight in zip("ab", sources, (0.6, 0.4), strict=True)
    ]
    prepare(with_tokenizer(paths, tmp_path / "out", tokenizer, sequence_length=32))
    manifest = check(tmp_path / "out", sources)
    printed = capsys.readouterr().out
    total = manifest.splits["train"].tokens
    for name, source, weight in zip("ab", manifest.sources, (0.6, 0.4), strict=True):
        assert source.name == f"{name}.jsonl" and source.weight == pytest.approx(weight)
        line = f"{name}.jsonl: {weight:.2%} asked, {100 * source.tokens / total:.2f}% got, "
        assert f"{line}{source.tokens:,} tokens of {source.documents:,} documents" in printed
    assert manifest.sources[0].left_out_tokens <= 16 and "; " in printed.splitlines()[-1]
    left_out = manifest.sources[1].left_out_tokens
    assert printed.rstrip().endswith(f"{left_out:,} tokens left out")


def test_a_scarce_source_limits_the_others_which_is_said_with_a_fix_that_works(
    kinds, tmp_path, capsys
):
    kind, tokenizer = kinds["word piece"]
    sources = [documents(kind, range(100), 20), documents(kind, range(100, 101), 30, seed=1)]
    paths = [
        str(write_rows(tmp_path / f"{name}.jsonl", source.texts))
        for name, source in zip("ab", sources, strict=True)
    ]
    weighted = [f"{paths[0]}:0.7", f"{paths[1]}:0.3"]
    prepare(with_tokenizer(weighted, tmp_path / "small", tokenizer))
    check(tmp_path / "small", sources)
    printed = capsys.readouterr().out
    tokens = len(sources[1].tokens[100]) + 1
    assert f"warning: b.jsonl has only {tokens} tokens to train on" in printed
    weights = re.search(r"give no weights, or, .* the weights (\d+) and (\d+)", printed)
    advised = [f"{path}:{weight}" for path, weight in zip(paths, weights.groups(), strict=True)]
    for number, following in enumerate((paths, advised)):
        prepare(with_tokenizer(following, tmp_path / f"{number}", tokenizer))
        manifest = check(tmp_path / f"{number}", sources)
        assert not manifest.splits["train"].left_out_tokens
        assert "warning" not in capsys.readouterr().out


def test_a_source_that_gets_nothing_is_an_error_whose_fixes_work(kinds, tmp_path):
    kind, tokenizer = kinds["word piece"]
    sources = [documents(kind, range(300), 20), documents(kind, range(300, 301), 900, seed=3)]
    assert len(sources[1].tokens[300]) > 200
    paths = [
        str(write_rows(tmp_path / f"{name}.jsonl", source.texts))
        for name, source in zip("ab", sources, strict=True)
    ]
    weighted = [f"{paths[0]}:0.99", f"{paths[1]}:0.01"]
    asked = with_tokenizer(weighted, tmp_path / "out", tokenizer, sequence_length=512)
    with pytest.raises(ForgeError, match="b.jsonl gets nothing: its share is") as error:
        prepare(asked)
    [problem] = error.value.problems
    length = int(
        re.match(r"use --sequence-length (\d+) or a shorter one, or leave", problem.fix)[1]
    )
    for number, shorter in enumerate((length, length // 2, length - 1)):
        folder = tmp_path / f"{number}"
        prepare(with_tokenizer(weighted, folder, tokenizer, sequence_length=shorter))
        assert all(source.tokens for source in check(folder, sources).sources)
    prepare(with_tokenizer(weighted[:1], tmp_path / "out", tokenizer, sequence_length=512))
    check(tmp_path / "out", sources[:1])


def test_a_source_without_text_to_train_on_is_an_error_whose_fix_works(kinds, tmp_path):
    _, tokenizer = kinds["word piece"]
    write_rows(tmp_path / "a.jsonl", ["w1 fin"] * 50)
    (tmp_path / "b.txt").write_text("\n\n\n")
    paths = [f"{tmp_path}/a.jsonl:0.5", f"{tmp_path}/b.txt:0.5"]
    with pytest.raises(ForgeError, match="b.txt has no text to train on") as error:
        prepare(with_tokenizer(paths, tmp_path / "out", tokenizer))
    assert error.value.problems[0].fix == "leave it out of --dataset-path"
    prepare(with_tokenizer(paths[:1], tmp_path / "out", tokenizer))


def test_a_share_that_is_missed_by_more_than_a_tenth_is_a_warning_whose_fix_works(
    kinds, tmp_path, capsys
):
    kind, tokenizer = kinds["word piece"]
    sources = [documents(kind, range(300), 20), documents(kind, range(300, 301), 9_000)]
    paths = [
        f"{write_rows(tmp_path / f'{name}.jsonl', source.texts)}:{weight}"
        for name, source, weight in zip("ab", sources, (0.9, 0.1), strict=True)
    ]
    missed = []
    for length in (700, 8):
        folder = tmp_path / f"{length}"
        prepare(with_tokenizer(paths, folder, tokenizer, sequence_length=length))
        manifest = check(folder, sources)
        printed = capsys.readouterr().out
        got = manifest.sources[1].tokens / manifest.splits["train"].tokens
        missed.append(abs(got - 0.1) > 0.01)
        line = f"warning: b.jsonl has got {100 * got:.2f}% of the training tokens, not 10.00%"
        assert (line in printed) == ("a shorter --sequence-length" in printed) == missed[-1]
    assert missed == [True, False]


def test_only_sources_of_a_mixture_can_miss_a_share():
    def manifest(*sources: tuple[float | None, int]) -> Manifest:
        facts = [SourceFacts(f"{n}", weight, 1, 1, tokens, 0, 0) for n, (weight, tokens)
                 in enumerate(sources)]  # fmt: skip
        train = SplitFacts(2, 1, sum(tokens for _, tokens in sources), 1, 0)
        return Manifest(8, 300, 0, "uint16", "t", {}, splits={"train": train}, sources=facts)

    assert not share_warnings(manifest((None, 5), (None, 95)))
    assert not share_warnings(manifest((0.5, 54), (0.5, 46)))
    assert len(share_warnings(manifest((0.5, 56), (0.5, 44)))) == 2
    assert not share_warnings(manifest((1.0, 100)))
    assert not share_lines(manifest((1.0, 100))) and len(share_lines(manifest((0.5, 1), (0.5, 1))))
    assert len(share_lines(manifest((None, 5), (None, 95)))) == 3


@pytest.mark.slow
def test_a_mixture_that_is_killed_at_random_moments_is_the_same(zygote, text, tmp_path):
    sources = f"{text}/a.txt:0.6,{text}/b.jsonl:0.2,{text}/c.jsonl.gz:0.2"
    words, log = [sources, str(tmp_path / "out"), "8", "none"], tmp_path / "log"
    pid = zygote.start(words, log, script="tests.data.killed_again_and_again")
    with pytest.MonkeyPatch.context() as small:
        make_pieces_small(small.setattr)
        asked = config(text, tmp_path / "whole", dataset_path=sources.split(","), num_workers=1)
        assert prepare(asked).splits["train"].left_out_tokens > 100
    assert zygote.wait(pid) == 0, log.read_text()
    killed, finished, after_some_pieces = map(int, log.read_text().split())
    assert killed >= 8 and finished >= 1 and after_some_pieces >= 2
    for number in range(finished):
        assert contents(tmp_path / "out" / str(number)) == contents(tmp_path / "whole")


def test_text_of_the_hub_is_streamed_once_and_its_bytes_are_right(
    kinds, tmp_path, monkeypatch, small_pieces
):
    kind, tokenizer = kinds["unigram"]
    source, streamed = documents(kind, range(200), 20), []

    def load_dataset(name, config, split, streaming):
        def rows():
            for text in source.texts:
                streamed.append(text)
                yield {"text": text}

        return datasets.IterableDataset.from_generator(rows)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    monkeypatch.setattr(hub, "name_on_hub", lambda path, flag: path)
    prepare(with_tokenizer("someone/corpus", tmp_path / "out", tokenizer, sequence_length=96))
    facts = check(tmp_path / "out", [source])
    assert facts.splits["train"].dropped_tokens and streamed == source.texts


def test_bytes_are_right_where_text_spells_a_control_token(kinds, tmp_path):
    """What it spells is encoded apart, so that no offsets of the whole document are its own."""
    kind, tokenizer = kinds["unigram"]
    text = "w1 \ufb01n </s> cafe\u0301 w2"
    path = write_rows(tmp_path / "a.jsonl", [text] * 40)
    sizes = []
    for length in (16, 17, 19, 23):
        folder = tmp_path / f"{length}"
        prepare(with_tokenizer(path, folder, tokenizer, sequence_length=length))
        manifest = Manifest.load(folder)
        tokens = [token for block in rows_of(folder) for token in block]
        ends = [place for place, token in enumerate(tokens) if token == manifest.eos_token_id]
        assert 30 < len(ends) <= 40
        rest = manifest.splits["train"].bytes - len(ends) * len(text.encode())
        sizes.append((len(tokens) - ends[-1] - 1, rest))
        assert 0 <= rest <= len(text.encode())
    assert len({count for count, _ in sizes}) > 2
    assert [size for _, size in sorted(sizes)] == sorted(size for _, size in sizes)
    assert all((size > 0) == (count > 0) for count, size in sizes)


def test_a_dataset_without_duplicates_counts_its_bytes(kinds, tmp_path, small_pieces):
    kind, tokenizer = kinds["word piece"]
    sources = [documents(kind, range(150), 30), documents(kind, range(150, 250), 60, seed=1)]
    paths = [
        f"{write_rows(tmp_path / f'{name}.jsonl', [*source.texts, *source.texts[::3]])}:0.5"
        for name, source in zip("ab", sources, strict=True)
    ]
    asked = {"deduplicate": "exact", "sequence_length": 64}
    prepare(with_tokenizer(paths, tmp_path / "out", tokenizer, **asked))
    manifest = check(tmp_path / "out", sources)
    assert manifest.left_out["repeated"].documents == 50 + 34
    assert manifest.splits["train"].left_out_tokens > 400


def test_several_ranks_write_the_mixture_of_one(text, ready_tokenizer, tmp_path, small_pieces):
    paths = [f"{text}/a.txt:0.3", f"{text}/b.jsonl:0.6", f"{text}/d.parquet:0.1"]
    for ranks in (1, 2):
        asked = {"dataset_path": paths, "tokenizer": str(ready_tokenizer), "num_workers": 1}
        with ThreadPoolExecutor(ranks) as pool:
            asked = config(text, tmp_path / f"{ranks}", **asked)
            of_ranks = [pool.submit(prepare, asked, Ranks(rank, ranks)) for rank in range(ranks)]
        assert all(of_rank.result().splits["train"].left_out_tokens for of_rank in of_ranks)
    assert contents(tmp_path / "1") == contents(tmp_path / "2")


def test_small_shares_that_differ_look_different():
    def facts(name: str, weight: float, tokens: int) -> SourceFacts:
        return SourceFacts(name, weight, 1, tokens, tokens, 0, 0)

    for asked, got in ((1e-4, 113), (1e-4, 89), (0.0094, 10_350), (1e-6, 0), (0.9, 800_000)):
        sources = [facts("a", 1 - asked, 10**6 - got), facts("b", asked, got)]
        split = SplitFacts(2, 1, 10**6, 10**6, 0)
        manifest = Manifest(8, 9, 0, "uint16", "", {}, {"train": split}, sources)
        warning = next(one for one in share_warnings(manifest) if one.startswith("b has"))
        one, other = re.findall(r"([\d.]+)%", warning)
        assert one != other and float(one) == pytest.approx(got / 10**4, rel=0.06)
        assert float(other) == pytest.approx(100 * asked, rel=0.06)
        assert f"{other}% asked, {one}% got" in share_lines(manifest)[2]


def test_a_source_that_is_all_repeated_is_said_to_be(kinds, tmp_path, capsys):
    _, tokenizer = kinds["word piece"]
    path = write_rows(tmp_path / "a.jsonl", [f"w{n} fin" for n in range(50)])
    again = write_rows(tmp_path / "b.jsonl", [f"w{n} fin" for n in range(50)])
    how = {"deduplicate": "exact"}
    with pytest.raises(ForgeError) as error:
        prepare(with_tokenizer([f"{path}:1", f"{again}:1"], tmp_path / "out", tokenizer, **how))
    (problem,) = error.value.problems
    assert problem.found == (
        "b.jsonl has no text to train on: 50 documents of it are left out, "
        "repeating or resembling an earlier one"
    )
    capsys.readouterr()
    prepare(with_tokenizer([f"{path}:1"], tmp_path / "out", tokenizer, **how))
    printed = capsys.readouterr().out
    assert " 0 documents" not in printed and "left out" not in printed
