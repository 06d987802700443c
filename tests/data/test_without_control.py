"""Text never becomes a control token and never stops the work, whatever the tokenizer is."""

from __future__ import annotations

from dataclasses import replace

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers
from tokenizers import pre_tokenizers as pre
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from p2p_llm_forge.data.dataset import Manifest
from p2p_llm_forge.data.encode import Encoders
from p2p_llm_forge.data.parts import column_of
from p2p_llm_forge.data.prepare import prepare
from p2p_llm_forge.data.tokenizer import control_tokens, load_tokenizer
from p2p_llm_forge.errors import ForgeError
from tests.data.preparations import with_tokenizer
from tests.data.tokenizers import (
    byte_tokenizer,
    per_document,
    sentencepiece_tokenizer,
    word_by_word,
)

LETTERS = "<|/>s abcdehilotxpn[]SEPUNKworldfm"
TEXTS = [
    *("plain", "</s>", "a</s>b", "hello </s> world", "</s></s>", "<</s>/s>", "</s", "/s> </s>x"),
    *(" </s> ", "x<|end|></s>", "[SEP] hello [SEP]", "[UNK] </s>", "<s>hello</s>", "", "world "),
]


def wrapped(backend: Tokenizer, **named) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(tokenizer_object=backend, **{"eos_token": "</s>"} | named)


def unigram(normalizer=None) -> PreTrainedTokenizerFast:
    """Lists `</s>` among its pieces, as T5's and Llama's do."""
    letters = sorted(set(LETTERS) - {" "}) + ["▁", "he", "▁wor"]
    pieces = [("<unk>", 0.0), ("<s>", 0.0), ("</s>", 0.0), *((text, -3.0) for text in letters)]
    backend = Tokenizer(models.Unigram(pieces, unk_id=0))
    backend.pre_tokenizer = pre.Metaspace(prepend_scheme="never")
    backend.decoder = decoders.Metaspace(prepend_scheme="never")
    if normalizer:
        backend.normalizer = normalizer
    backend.add_special_tokens(["<unk>", "<s>", "</s>"])
    return wrapped(backend, unk_token="<unk>", bos_token="<s>")


def bpe_that_merges_to_its_end(**model) -> PreTrainedTokenizerFast:
    """Byte-level, whose own merges give `</s>`, or which takes whole words of the vocabulary."""
    alphabet = {text: n for n, text in enumerate(sorted(pre.ByteLevel.alphabet()))}
    merges = [("<", "/"), ("</", "s"), ("</s", ">")]
    vocabulary = alphabet | {"</": 256, "</s": 257, "</s>": 258, "[SEP]": 259}
    backend = Tokenizer(models.BPE(vocabulary, merges, **model))
    backend.pre_tokenizer = pre.Sequence(
        [pre.Split(" ", "merged_with_next"), pre.ByteLevel(False, use_regex=False)]
    )
    backend.decoder = decoders.ByteLevel()
    return wrapped(backend, additional_special_tokens=["[SEP]"])


def words(kind, **settings) -> PreTrainedTokenizerFast:
    """Whole words between spaces, `</s>` and `[SEP]` among them."""
    vocabulary = ["[UNK]", "</s>", "[SEP]", "hello", "world", "plain", "<s>"]
    backend = Tokenizer(kind({text: n for n, text in enumerate(vocabulary)}, **settings))
    backend.pre_tokenizer = pre.WhitespaceSplit()
    backend.add_special_tokens(["[UNK]", "</s>", "[SEP]"])
    return wrapped(backend)


LOSSLESS = {
    "Unigram": unigram,
    "byte-level": byte_tokenizer,
    "merges": bpe_that_merges_to_its_end,
    "whole words": lambda: bpe_that_merges_to_its_end(ignore_merges=True),
    "an end that is no special token": lambda: byte_tokenizer(added=(AddedToken("</s>"),)),
}


def encoded(tokenizer, texts, **how) -> list[list[int]]:
    return per_document(*Encoders(tokenizer, **how).encode(column_of([t.encode() for t in texts])))


def no_control(tokenizer, ids) -> bool:
    vocabulary = tokenizer.get_vocab()
    ends = (tokenizer.eos_token, tokenizer.bos_token, "[SEP]", "<s>", "</s>", "<|end|>")
    control = {vocabulary[text] for text in ends if text in vocabulary}
    return tokenizer.eos_token_id in control and not control & {n for one in ids for n in one}


@pytest.mark.parametrize("make", LOSSLESS.values(), ids=LOSSLESS)
def test_text_that_spells_control_tokens_comes_back_and_holds_none(make):
    tokenizer = make()
    if make is LOSSLESS["an end that is no special token"]:
        tokenizer.eos_token = "</s>"
    spelled = [control for control in control_tokens(tokenizer) if control]
    texts = TEXTS + [f"a{control}b {control}" for control in spelled]
    ids = encoded(tokenizer, texts)
    assert no_control(tokenizer, ids)
    assert [tokenizer.decode(one, clean_up_tokenization_spaces=False) for one in ids] == texts


@pytest.mark.parametrize(
    ("normalizer", "trap"),
    [(normalizers.NFKC(), "a\uff1c/s\uff1eb"), (normalizers.Lowercase(), "a</S>b")],
)
def test_letters_of_which_a_normalizer_makes_a_control_token_are_text_too(normalizer, trap):
    tokenizer = unigram(normalizer)
    alone = tokenizer.backend_tokenizer.encode(trap, add_special_tokens=False).ids
    assert tokenizer.eos_token_id in alone, "the trap that this test is about"
    [ids] = encoded(tokenizer, [trap])
    assert no_control(tokenizer, [ids])
    assert tokenizer.decode(ids) == "a</s>b"


@pytest.mark.parametrize("kind", [models.WordLevel, models.WordPiece])
def test_words_that_are_control_tokens_become_the_unknown_one(kind):
    tokenizer = words(kind, unk_token="[UNK]")
    assert tokenizer.unk_token is None, "its model makes one that its wrapper does not declare"
    ids = encoded(tokenizer, ["hello </s> world", "hello [UNK] you", "[SEP]"])
    names = [tokenizer.convert_ids_to_tokens(one) for one in ids]
    assert names == [["hello", "[UNK]", "world"], ["hello", "[UNK]", "[UNK]"], ["[UNK]"]]


def test_the_unknown_token_of_a_unigram_model_is_no_control_token_either():
    backend = unigram().backend_tokenizer
    tokenizer = wrapped(backend)
    assert tokenizer.unk_token is None
    assert encoded(tokenizer, ["é"]) == [[0]]
    assert set(control_tokens(tokenizer)) == {"<s>", "</s>"}


def test_what_a_tokenizer_cannot_encode_is_one_error_or_left_out(tmp_path):
    tokenizer = words(models.WordLevel, unk_token="<none>")  # not in its vocabulary: it raises
    texts = ["hello world", "hello you", "plain", "a </s> b", "world"]
    with pytest.raises(ForgeError, match="'hello you'.*Missing .*(?s:.)*--skip-bad-rows"):
        Encoders(tokenizer).encode(column_of([text.encode() for text in texts]))
    column = column_of([text.encode() for text in texts])
    tokens, lengths = Encoders(tokenizer, skips_bad=True).encode(column)
    assert tokens.tolist() == [3, 4, 5, 4] and lengths.tolist() == [2, -1, 1, -1, 1]

    tokenizer.save_pretrained(tmp_path / "words")
    (tmp_path / "text.txt").write_text("\n\n".join(texts * 20))
    asked = with_tokenizer(tmp_path / "text.txt", tmp_path / "out", tmp_path / "words")
    with pytest.raises(ForgeError, match="cannot encode the document that begins 'hello you'"):
        prepare(asked)
    asked = with_tokenizer(
        tmp_path / "text.txt", tmp_path / "out", tmp_path / "words", skip_bad_rows=True
    )
    manifest = prepare(asked)
    assert manifest.splits["train"].documents == 60
    assert manifest.left_out["not_encoded"].documents == 40
    assert manifest.left_out["not_encoded"].bytes == 20 * len("hello youa </s> b")
    assert Manifest.load(tmp_path / "out").left_out == manifest.left_out


def test_an_unknown_token_that_is_the_end_of_text_cannot_stand_for_text():
    tokenizer = words(models.WordLevel, unk_token="</s>")
    with pytest.raises(ForgeError, match="control token '</s>' of the text"):
        encoded(tokenizer, ["hello you"])
    assert encoded(tokenizer, ["hello world"]) == [[3, 4]]


def test_a_tokenizer_in_python_whose_pieces_hold_its_end_spells_it(tmp_path):
    tokenizer = sentencepiece_tokenizer(tmp_path)
    trap = "hello <|end|> world"
    alone = tokenizer(trap, split_special_tokens=True, add_special_tokens=False)["input_ids"]
    assert tokenizer.eos_token_id in alone, "the trap that this test is about"
    texts = [trap, "a<|end|>b", "<|end|><|end|>", "plain", "</s> x"]
    ids = encoded(tokenizer, texts)
    assert no_control(tokenizer, ids)
    assert [tokenizer.decode(one, clean_up_tokenization_spaces=False) for one in ids] == texts


def test_ordinary_added_tokens_of_a_tokenizer_in_python_are_found_as_it_finds_them(tmp_path):
    tokenizer = sentencepiece_tokenizer(tmp_path)
    tokenizer.add_tokens([AddedToken("<abc>", normalized=False), AddedToken("hello")])
    texts = ["<abc>world", "a <abc> hello b", "plain", "world"]
    right = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
    assert tokenizer.convert_tokens_to_ids("<abc>") in right[0]
    assert encoded(tokenizer, texts) == right
    [ids] = encoded(tokenizer, ["a <abc> <|end|> <s>"])
    assert no_control(tokenizer, [ids])
    assert tokenizer.decode(ids, clean_up_tokenization_spaces=False) == "a <abc> <|end|> <s>"


def test_a_stranger_in_python_of_whole_words_gives_its_unknown_token(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    word_by_word(tmp_path / "words")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "words", trust_remote_code=True)
    assert encoded(tokenizer, ["hello </s> world", "you"]) == [[2, 0, 3], [0]]
    with pytest.raises(ForgeError, match="ValueError: no such letters"):
        encoded(tokenizer, ["hello", "boom"])
    assert encoded(tokenizer, ["hello"], skips_bad=True) == [[2]]


def letter_by_letter(letters: str, eos_token: str = "<end>", **model) -> PreTrainedTokenizerFast:
    """Has no unknown token: it drops the letters that it does not know."""
    vocabulary = {text: n for n, text in enumerate(dict.fromkeys([*letters, eos_token]))}
    backend = Tokenizer(models.BPE(vocabulary, [], **model))
    backend.decoder = decoders.Fuse()
    return wrapped(backend, eos_token=eos_token)


@pytest.mark.parametrize("text", ["This. Is", ".", "one\ntwo", "Zürich"])
def test_text_for_which_there_is_no_token_is_never_dropped(text):
    tokenizer = letter_by_letter("abcdefghijklmnopqrstuvwxyz \nTIZ", "\n" if "\n" in text else ".")
    dropped = tokenizer.backend_tokenizer.encode(text.replace(tokenizer.eos_token, "\r")).tokens
    assert len("".join(dropped)) < len(text), "the trap that this test is about"
    with pytest.raises(ForgeError, match=r"no token for a part of the text(?s:.)*--skip-bad-rows"):
        encoded(tokenizer, ["plain", text])
    column = column_of([one.encode() for one in ["plain", text, "x"]])
    tokens, lengths = Encoders(tokenizer, skips_bad=True).encode(column)
    assert lengths.tolist() == [5, -1, 1]
    assert "".join(tokenizer.convert_ids_to_tokens(tokens.tolist())) == "plainx"


def test_what_is_hidden_is_spelled_by_its_bytes_where_the_vocabulary_has_them():
    letters = ["a", "b", *(f"<0x{byte:02X}>" for byte in range(256))]
    tokenizer = letter_by_letter(letters, "\n", byte_fallback=True)
    [ids] = encoded(tokenizer, ["a\nb"])
    assert tokenizer.convert_ids_to_tokens(ids) == ["a", "<0x0A>", "b"]


def test_an_end_that_the_text_needs_is_an_error_whose_fix_is_another_end(tmp_path):
    byte_tokenizer().save_pretrained(tmp_path / "bytes")
    texts = ["Hello world. This is it.", "no dot here", "."]
    (tmp_path / "text.jsonl").write_text("".join(f'{{"text": "{t}"}}\n' for t in texts * 9))
    asked = with_tokenizer(
        tmp_path / "text.jsonl", tmp_path / "out", tmp_path / "bytes", eos_token="."
    )
    with pytest.raises(ForgeError, match="'Hello world.*no token for a part") as error:
        prepare(asked)
    assert error.value.problems[0].fix.startswith("give another --eos-token, such as '<|endoft")
    prepare(replace(asked, eos_token="<|endoftext|>"))
    asked = replace(asked, output_dir=str(tmp_path / "other"), skip_bad_rows=True)
    assert prepare(asked).left_out["not_encoded"].documents == 18


def test_an_end_that_is_the_tokenizers_own_is_not_to_be_replaced(tmp_path):
    letter_by_letter("abc\n", "\n").save_pretrained(tmp_path / "letters")
    loaded_from = {"name": str(tmp_path / "letters"), "eos_token": "\n"}
    with pytest.raises(ForgeError) as error:
        encoded(load_tokenizer(**loaded_from), ["a\nb"], loaded_from=loaded_from)
    assert error.value.problems[0].fix.startswith("add --skip-bad-rows")


def test_a_tokenizer_that_panics_on_a_document_is_one_error_or_left_out():
    spaces = AddedToken("\t", rstrip=True), AddedToken("\n", lstrip=True)
    tokenizer = byte_tokenizer(added=spaces)
    with pytest.raises(BaseException, match="bad split") as panic:
        tokenizer.backend_tokenizer.encode("a \t \n b")
    assert not isinstance(panic.value, Exception), "the trap that this test is about"
    with pytest.raises(ForgeError, match=r"begins 'a \\t \\n b' .*bad split"):
        encoded(tokenizer, ["fine", "a \t \n b"])
    column = column_of([b"fine", b"a \t \n b", b"fine"])
    _, lengths = Encoders(tokenizer, skips_bad=True).encode(column)
    assert lengths[1] == -1 and lengths[0] == lengths[2] > 0
