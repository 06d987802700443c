"""Hunt for texts on which gigatoken and tokenizers differ, and ask whether the proof finds each.

    python benchmarks/token_hunt.py --results hunt.json
    python benchmarks/token_hunt.py --results hunt.json --only "byte-level, NFC" "Unigram"

Small tokenizers of all families, normalizers, pre-tokenizers and kinds of added tokens are trained
here, without a network. Each is asked for the same nasty documents, by gigatoken and by tokenizers,
both directly. Then the encoders of this project are: which of the two they choose, why, and whether
a document of theirs has other tokens than tokenizers gives. Prints a table. A tokenizer that is in
the file of results is not asked again unless it is named.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import sys
import tempfile
import unicodedata
from collections.abc import Callable, Iterator
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
os.environ["HF_HUB_OFFLINE"] = "1"

from tokenizers import AddedToken, Regex, Tokenizer, models, trainers  # noqa: E402
from tokenizers import decoders as dec  # noqa: E402
from tokenizers import normalizers as norm  # noqa: E402
from tokenizers import pre_tokenizers as pre  # noqa: E402

END = "<|endoftext|>"
SPECIAL = ["<unk>", "<s>", "</s>", END]
WORDS = [
    *(
        "peer",
        "block",
        "Gewicht",
        "öğrenme",
        "öğrenciler",
        "模型",
        "模型训练",
        "학습",
        "データを読む",
    ),
    *("обучение", "δίκτυο", "تعلم", "רשת", "ฝึกสอน", "सीखना", "don't", "we'll", "I'M", "you're"),
    *("3.14", "2026", "1234567", "==", "!=", "->", "//", "/*", "x=1;", "foo_bar", "__init__"),
    *("HTTP/2", "naïve", "café", "Ångström", "ﬁne", "½", "²", "İstanbul", "ıŞık", "straße", "ǅ"),
    *("the", "The", "THE", "of", "and", "training", "tokens"),
]
# One added token of each kind at a time; their spellings stand in the documents of all.
SPELLINGS = ["öğrenciler", "<think>", "</think>", "<|tool|>", "@@", "ab", "<thin", "k>x", "  "]
SPELLINGS += ["ab<th"]
OTHERS = [*SPECIAL, "[UNK]", "[SEP]", "<0x0A>", "<0xE2>", "<|end", "text|>", "▁", "##ing"]
SPACES = [" ", "  ", "\n", "\r\n", "\t", "\n\n\n", "\u00a0", "\u3000", "\u2028", "\x85", " " * 30]

GPT4 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]|\s+(?!\S)|\s+"
)
QWEN2 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
OLMO3 = QWEN2.replace(r"\p{N}|", r"\p{N}{1,3}|", 1)
O200K = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+"
    r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


# --- documents ------------------------------------------------------------------------------------


def nasty_documents(count: int, seed: int = 0) -> list[str]:
    """Words of many scripts, spellings of tokens, unusual spaces and characters of all planes, next
    to each other or glued."""
    chosen = random.Random(seed)
    assigned = [chr(n) for n in range(0x110000) if unicodedata.category(chr(n))[0] != "C"]
    marks = [letter for letter in assigned if unicodedata.category(letter)[0] == "M"]

    def piece() -> str:
        kind = chosen.random()
        if kind < 0.35:
            return chosen.choice(WORDS)
        if kind < 0.55:
            return chosen.choice(SPELLINGS) * chosen.choice((1, 1, 2))
        if kind < 0.62:
            return chosen.choice(OTHERS)
        if kind < 0.72:
            return chosen.choice(assigned)
        if kind < 0.80:
            return chosen.choice("aeou\u0627\u05d0\u0915 ") + "".join(chosen.choices(marks, k=2))
        if kind < 0.83:
            number = chosen.randrange(0x10F800)
            return chr(number if number < 0xD800 else number + 0x800)
        return chosen.choice(SPACES) if kind < 0.93 else chosen.choice(WORDS)[:2]

    def document() -> str:
        glue = chosen.choice(("", "", " "))
        return glue.join(piece() for _ in range(chosen.randint(1, 14)))

    return [document() for _ in range(count)]


# --- tokenizers -----------------------------------------------------------------------------------


def trained(model: Any, pre_tokenizer: Any = None, normalizer: Any = None, **options: Any) -> Any:
    """A tokenizer of this model, trained on words of many scripts."""
    tokenizer = Tokenizer(model)
    if pre_tokenizer:
        tokenizer.pre_tokenizer = pre_tokenizer
    if normalizer:
        tokenizer.normalizer = normalizer
    kinds = {
        "BPE": trainers.BpeTrainer, "Unigram": trainers.UnigramTrainer,
        "WordPiece": trainers.WordPieceTrainer, "WordLevel": trainers.WordLevelTrainer,
    }  # fmt: skip
    asked = {"vocab_size": 900, "special_tokens": SPECIAL, "show_progress": False} | options
    chosen = random.Random(1)
    text = [" ".join(chosen.choices(WORDS, k=20)) for _ in range(400)]
    tokenizer.train_from_iterator(text, kinds[type(model).__name__](**asked))
    return tokenizer


def byte_level(pre_tokenizer: Any = None, normalizer: Any = None, **model: Any) -> Any:
    alphabet = sorted(pre.ByteLevel.alphabet())
    pre_tokenizer = pre_tokenizer or pre.ByteLevel(add_prefix_space=False)
    options = {"initial_alphabet": alphabet}
    options |= {k: model.pop(k) for k in list(model) if k.endswith(("prefix", "suffix"))}
    tokenizer = trained(models.BPE(**model), pre_tokenizer, normalizer, **options)
    tokenizer.decoder = dec.ByteLevel()
    return tokenizer


def split(pattern: str, *more: Any, behavior: str = "isolated", invert: bool = False) -> Any:
    parts = [pre.Split(Regex(pattern), behavior, invert), *more]
    return pre.Sequence([*parts, pre.ByteLevel(add_prefix_space=False, use_regex=False)])


def byte_fallback(
    pre_tokenizer: Any = None, normalizer: Any = None, every_byte: bool = True
) -> Any:
    """A BPE tokenizer in the manner of SentencePiece, with a token for each byte."""
    learned = trained(models.BPE(unk_token="<unk>"), pre_tokenizer, normalizer)
    rules = json.loads(learned.to_str())
    rules["model"] |= {"byte_fallback": True, "fuse_unk": True}
    vocabulary = rules["model"]["vocab"]
    for byte in range(256 if every_byte else 128):
        vocabulary.setdefault(f"<0x{byte:02X}>", len(vocabulary))
    return Tokenizer.from_str(json.dumps(rules))


def with_added(tokenizer: Any, *spellings: str, **kinds: bool) -> Any:
    tokens = [AddedToken(text, **{"normalized": False} | kinds) for text in spellings]
    tokenizer.add_tokens(tokens)
    return tokenizer


def with_model(tokenizer: Any, **settings: Any) -> Any:
    rules = json.loads(tokenizer.to_str())
    rules["model"] |= settings
    return Tokenizer.from_str(json.dumps(rules))


def llama(**more: Any) -> Any:
    return byte_fallback(None, norm.Sequence([norm.Prepend("▁"), norm.Replace(" ", "▁")]), **more)


def mixed_kinds() -> Any:
    return with_added(with_added(byte_level(), "<think>", "  "), "ab<th", "k>x", normalized=True)


TOKENIZERS: dict[str, Callable[[], Any]] = {
    "byte-level": byte_level,
    "byte-level, prefix space": lambda: byte_level(pre.ByteLevel(add_prefix_space=True)),
    "byte-level, no regex": lambda: byte_level(pre.ByteLevel(False, use_regex=False)),
    "byte-level, GPT-4's regex": lambda: byte_level(split(GPT4)),
    "byte-level, o200k's regex": lambda: byte_level(split(O200K)),
    "byte-level, OLMo's regex": lambda: byte_level(split(OLMO3)),
    "byte-level, removed inverse": lambda: byte_level(split(GPT4, behavior="removed", invert=True)),
    "byte-level, merged with next": lambda: byte_level(split(GPT4, behavior="merged_with_next")),
    "byte-level, regex and digits": lambda: byte_level(split(GPT4, pre.Digits(True))),
    "byte-level, digits": lambda: byte_level(
        pre.Sequence([pre.Digits(True), pre.ByteLevel(add_prefix_space=False)])
    ),
    "byte-level, twice": lambda: byte_level(
        pre.Sequence([pre.ByteLevel(False), pre.ByteLevel(False)])
    ),
    "byte-level, regex, prefix space": lambda: byte_level(
        pre.Sequence([pre.Split(Regex(GPT4), "isolated"), pre.ByteLevel(True, use_regex=False)])
    ),
    "byte-level, ignore_merges": lambda: with_model(byte_level(split(GPT4)), ignore_merges=True),
    "byte-level, NFC": lambda: byte_level(normalizer=norm.NFC()),
    "byte-level, NFC, Qwen's regex": lambda: byte_level(split(QWEN2), norm.NFC()),
    "byte-level, NFC, added": lambda: with_added(
        byte_level(split(QWEN2), norm.NFC()), "<think>", "</think>", "öğrenciler"
    ),
    "byte-level, NFC, added normalized": lambda: with_added(
        byte_level(normalizer=norm.NFC()), "<think>", "öğrenciler", normalized=True
    ),
    "byte-level, NFD": lambda: byte_level(normalizer=norm.NFD()),
    "byte-level, NFKC": lambda: byte_level(normalizer=norm.NFKC()),
    "byte-level, Lowercase": lambda: byte_level(normalizer=norm.Lowercase()),
    "byte-level, NFD, StripAccents": lambda: byte_level(
        normalizer=norm.Sequence([norm.NFD(), norm.StripAccents()])
    ),
    "byte-level, Replace": lambda: byte_level(normalizer=norm.Replace("ö", "oe")),
    "byte-level, Prepend": lambda: byte_level(normalizer=norm.Prepend("x")),
    "byte-level, subword prefix": lambda: byte_level(continuing_subword_prefix="##"),
    "byte-level, word suffix": lambda: byte_level(end_of_word_suffix="</w>"),
    "byte-level, added": lambda: with_added(byte_level(), *SPELLINGS),
    "byte-level, added normalized": lambda: with_added(byte_level(), *SPELLINGS, normalized=True),
    "byte-level, added both ways": mixed_kinds,
    "byte-level, added single_word": lambda: with_added(
        byte_level(), "öğrenciler", "<think>", "ab", single_word=True
    ),
    "byte-level, added lstrip": lambda: with_added(byte_level(), "<think>", "ab", lstrip=True),
    "byte-level, added rstrip": lambda: with_added(byte_level(), "<think>", "ab", rstrip=True),
    "byte-level, added lstrip rstrip": lambda: with_added(
        byte_level(), "<think>", "@@", lstrip=True, rstrip=True
    ),
    "byte-level, added rstrip, spaces": lambda: with_added(
        with_added(byte_level(), "  "), "<think>", "ab", rstrip=True
    ),
    "byte fallback, Llama": llama,
    "byte fallback, Metaspace": lambda: byte_fallback(pre.Metaspace()),
    "byte fallback, Metaspace first": lambda: byte_fallback(
        pre.Metaspace(prepend_scheme="first", split=False)
    ),
    "byte fallback, Gemma": lambda: byte_fallback(
        pre.Split(" ", "merged_with_previous"), norm.Replace(" ", "▁")
    ),
    "byte fallback, some bytes": lambda: llama(every_byte=False),
    "byte fallback, Strip": lambda: byte_fallback(
        None, norm.Sequence([norm.Strip(), norm.Replace(" ", "▁")])
    ),
    "byte fallback, NFKC": lambda: byte_fallback(pre.Metaspace(), norm.NFKC()),
    "byte fallback, added": lambda: with_added(llama(), *SPELLINGS),
    "byte fallback, added normalized": lambda: with_added(llama(), *SPELLINGS, normalized=True),
    "byte fallback, added single_word": lambda: with_added(
        llama(), "öğrenciler", "ab", single_word=True
    ),
    "byte fallback, added strip": lambda: with_added(
        llama(), "<think>", "ab", lstrip=True, rstrip=True
    ),
    "BPE, whitespace": lambda: trained(models.BPE(unk_token="<unk>"), pre.Whitespace()),
    "Unigram": lambda: trained(models.Unigram(), pre.Metaspace(), unk_token="<unk>"),
    "Unigram, NFKC, Lowercase": lambda: trained(
        models.Unigram(),
        pre.Metaspace(),
        norm.Sequence([norm.NFKC(), norm.Lowercase()]),
        unk_token="<unk>",
    ),  # fmt: skip
    "WordPiece, Bert": lambda: trained(
        models.WordPiece(unk_token="<unk>"), pre.BertPreTokenizer(), norm.BertNormalizer()
    ),
    "WordLevel": lambda: trained(models.WordLevel(unk_token="<unk>"), pre.WhitespaceSplit()),
}


# --- the hunt -------------------------------------------------------------------------------------


def expected_tokens(tokenizer: Any, texts: list[str]) -> list[list[int]]:
    """What tokenizers gives for text in which special tokens are spelled out as text."""
    tokenizer.encode_special_tokens = True
    return [e.ids for e in tokenizer.encode_batch_fast(texts, add_special_tokens=False)]


def gigatokens(tokenizer: Any, texts: list[str]) -> list[list[int]] | None:
    """What gigatoken gives, without the special tokens; None when it does not take it."""
    import gigatoken

    rules = json.loads(tokenizer.to_str())
    rules["added_tokens"] = [t for t in rules["added_tokens"] if not t["special"]]
    try:
        found = gigatoken.Tokenizer.from_json(json.dumps(rules)).encode_batch(texts, parallel=False)
    except Exception:  # several of its own
        return None
    return found.to_list()


def hunt(tokenizer: Any, texts: list[str]) -> dict[str, Any]:
    """How many documents differ: gigatoken's, and those of this project's encoders."""
    from transformers import PreTrainedTokenizerFast

    from p2p_llm_forge.data.encode import Encoders
    from p2p_llm_forge.data.fast_path import FastPathDiffers
    from p2p_llm_forge.data.parts import column_of

    expected = expected_tokens(tokenizer, texts)
    theirs = gigatokens(tokenizer, texts)
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=END, unk_token="<unk>", bos_token="<s>"
    )
    encoders = Encoders(wrapped, skips_bad=True)
    control = {tokenizer.token_to_id(text) for text in SPECIAL} - {tokenizer.token_to_id("<unk>")}
    found = {"differing": 0, "control": 0, "first": "", "found_late": 0, "left_out": 0}
    for start in range(0, len(texts), 500):
        part, right = texts[start : start + 500], expected[start : start + 500]
        try:
            tokens, lengths = encoders.encode(column_of([text.encode() for text in part]))
        except FastPathDiffers as difference:  # by a sample of the text
            found["found_late"] += len(part)
            found["first"] = found["first"] or str(difference)
            continue
        ours = np.split(tokens, np.cumsum(lengths.clip(0)))[:-1]
        for text, got, ids, length in zip(part, ours, right, lengths, strict=True):
            if length < 0:  # tokenizers would leave a part of the text out without a word
                found["left_out"] += 1
                continue
            found["control"] += not control.isdisjoint(ids)
            # Where tokenizers makes a control token of text, all that counts is that we do not.
            is_wrong = control.isdisjoint(ids) and got.tolist() != ids
            if is_wrong or not control.isdisjoint(got.tolist()):
                found["differing"] += 1
                found["first"] = found["first"] or text
    wrong = [] if theirs is None else [a != b for a, b in zip(theirs, expected, strict=True)]
    return found | {
        "supported": theirs is not None,
        "wrong": sum(wrong),
        "is_fast": encoders.is_fast,
        "reason": encoders.reason,
        "documents": len(texts),
    }


def table(results: dict[str, dict[str, Any]]) -> Iterator[str]:
    yield "| tokenizer | documents that gigatoken gets wrong | the proof | wrong in our tokens |"
    yield "|---|---|---|---|"
    for name, found in results.items():
        wrong = f"{found['wrong']:,}" if found["supported"] else "refused by it"
        proof = found["reason"].replace("|", "\\|")
        proof = proof if len(proof) < 90 else proof[:90] + "…"
        # What is not in NFC is left to the tokenizer itself.
        passed = "passed, NFC left to the tokenizer" if found["wrong"] else "passed"
        yield f"| {name} | {wrong} | {proof or passed} | {found['differing']:,} |"
    unlike = [name for name, found in results.items() if found["wrong"]]
    missed = [name for name in unlike if results[name]["is_fast"] and results[name]["differing"]]
    missed += [name for name, found in results.items() if found["found_late"]]
    yield ""
    control = sum(found["control"] for found in results.values())
    yield f"{len(results)} tokenizers; gigatoken takes and gets wrong {len(unlike)} of them; missed"
    yield f"by the proof: {', '.join(missed) or 'none'}. Of {control:,} documents tokenizers makes"
    yield "control tokens, which are in none of ours."


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--results", type=Path, required=True, help="JSON file that they go to")
    parser.add_argument("--documents", type=int, default=20_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", nargs="+", choices=TOKENIZERS, help="these, also once more")
    asked = parser.parse_args()
    results = json.loads(asked.results.read_text()) if asked.results.exists() else {}
    texts = nasty_documents(asked.documents, asked.seed)
    # What an earlier hunt has kept says nothing about this one.
    os.environ["XDG_CACHE_HOME"] = tempfile.mkdtemp()
    for name, make in TOKENIZERS.items():
        if name in (asked.only or TOKENIZERS) and (asked.only or name not in results):
            results[name] = hunt(make(), texts)
            print(name, {k: v for k, v in results[name].items() if v}, flush=True)
            asked.results.write_text(json.dumps(results, indent=2, ensure_ascii=False))
    packages = ", ".join(f"{p} {version(p)}" for p in ("gigatoken", "tokenizers", "transformers"))
    print(f"\n{date.today()}, Python {platform.python_version()}, {packages}.", end=" ")
    print(f"{asked.documents:,} documents of seed {asked.seed} for each tokenizer.\n")
    print("\n".join(table({name: results[name] for name in TOKENIZERS if name in results})))
    return int(any(found["differing"] or found["found_late"] for found in results.values()))


if __name__ == "__main__":
    sys.exit(main())
