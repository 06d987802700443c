"""Tokenizers whose every token is known beforehand, and documents with the text of each token.

A normalizer changes the length of the text in all of them but `byte_level`, so that no decoded
token says how many bytes of text it stands for.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

NUMBERS = 1_000  # documents at most: the first word of each is its number
WORDS = ["ﬁn", "cafe\u0301", "Straße", "ÖĞRENCİ", "xyzzy", "Ⅷ"]


class Token(NamedTuple):
    """A token of a document: its number, and the text that it stands for."""

    number: int
    text: str


class Kind(NamedTuple):
    """A tokenizer, and which tokens it makes of a word with the white space before it."""

    tokenizer: PreTrainedTokenizerFast
    tokens_of: Callable[[str], list[Token]]


def _fast(backend: Tokenizer) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>")


def unigram() -> Kind:
    """Whole words, of which NFKC makes others; `xyzzy` is unknown."""
    known = {"ﬁn": "fin", "cafe\u0301": "café", "Straße": "Straße", "ÖĞRENCİ": "ÖĞRENCİ"}
    known |= {"Ⅷ": "VIII"} | {f"w{n}": f"w{n}" for n in range(NUMBERS)}
    pieces = ["<unk>", "</s>", *(f"▁{word}" for word in known.values()), "▁"]
    scores = [(piece, -1.0 - 19 * (number < 2)) for number, piece in enumerate(pieces)]
    backend = Tokenizer(models.Unigram(scores, 0))
    backend.normalizer = normalizers.NFKC()
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.decoder = decoders.Metaspace()

    def tokens_of(word: str) -> list[Token]:
        if word.strip() in known:
            return [Token(pieces.index(f"▁{known[word.strip()]}"), word)]
        space = word[: len(word) - len(word.lstrip())]
        return [Token(pieces.index("▁"), space), Token(0, word.lstrip())]

    return Kind(_fast(backend), tokens_of)


def word_piece() -> Kind:
    """Lower case without accents, as BERT's; `xyzzy` is unknown."""
    known = {"ﬁn": "ﬁn", "cafe\u0301": "cafe", "Straße": "straße", "ÖĞRENCİ": "ogrenci", "Ⅷ": "ⅷ"}
    known |= {f"w{n}": f"w{n}" for n in range(NUMBERS)}
    words = ["[UNK]", "</s>", *known.values()]
    model = models.WordPiece({word: n for n, word in enumerate(words)}, unk_token="[UNK]")
    backend = Tokenizer(model)
    backend.normalizer = normalizers.BertNormalizer(lowercase=True)
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.decoder = decoders.WordPiece()

    def tokens_of(word: str) -> list[Token]:
        return [Token(words.index(known.get(word.strip(), "[UNK]")), word)]

    return Kind(_fast(backend), tokens_of)


def byte_level() -> Kind:
    """Every byte of the text is a token."""
    # GPT-2's table: what can be printed stands for itself, the rest for characters from 256 on.
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    letters = {byte: chr(byte) for byte in printable}
    letters |= {byte: chr(256 + n) for n, byte in enumerate(others)}
    vocabulary = {letters[byte]: byte + 1 for byte in range(256)} | {"</s>": 0}
    backend = Tokenizer(models.BPE(vocabulary, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()

    def tokens_of(word: str) -> list[Token]:
        # Latin-1, so that the text of a token is as long as the byte that it is.
        return [Token(byte + 1, "x") for byte in word.encode()]

    return Kind(_fast(backend), tokens_of)


KINDS = {"unigram": unigram, "word piece": word_piece, "byte level": byte_level}


class Documents(NamedTuple):
    """Documents of a source, and their tokens by the number that each begins with."""

    texts: list[str]
    tokens: dict[int, list[Token]]


def documents(kind: Kind, numbers: range, most_words: int, seed: int = 0) -> Documents:
    """A document for each number, of up to so many words and a few spaces between them."""
    chosen = random.Random(seed)
    texts, tokens = [], {}
    for number in numbers:
        words = [f"w{number}", *chosen.choices(WORDS, k=chosen.randint(1, most_words))]
        words = [words[0], *(" " + word for word in words[1:])]
        texts.append("".join(words))
        tokens[number] = [token for word in words for token in kind.tokens_of(word)]
    return Documents(texts, tokens)


def save(kind: Kind, folder: Path) -> Path:
    """Write the tokenizer as transformers reads it."""
    kind.tokenizer.save_pretrained(folder)
    return folder


class Given(NamedTuple):
    """What a source has given to the blocks of a split, counted token by token."""

    documents: int
    tokens: int
    bytes: int


def given(blocks: list[list[int]], eos: int, sources: list[Documents]) -> list[Given]:
    """What each source has given to these blocks. A document without its end stops with a block."""
    of_source = {n: s for s, source in enumerate(sources) for n in source.tokens}
    every = {n: tokens for source in sources for n, tokens in source.tokens.items()}
    whole = {tuple(token.number for token in tokens): n for n, tokens in every.items()}
    totals = [[0, 0, 0] for _ in sources]

    def count(number: int, length: int, end: int) -> None:
        total, text = totals[of_source[number]], every[number][:length]
        total[0] += 1
        total[1] += length + end
        total[2] += sum(len(token.text.encode()) for token in text)

    def beginning(part: tuple[int, ...]) -> int:
        [number, *_] = [n for tokens, n in whole.items() if tokens[: len(part)] == part]
        return number

    part: tuple[int, ...] = ()
    cuts: set[int] = set()  # where in `part` a block begins
    for block in blocks:
        cuts.add(len(part))
        for token in block:
            if token != eos:
                part += (token,)
                continue
            if part not in whole:  # after a document that is cut
                [cut] = [at for at in cuts if at and part[at:] in whole]
                count(beginning(part[:cut]), cut, 0)
                part = part[cut:]
            count(whole.pop(part), len(part), 1)
            part, cuts = (), set()
    if part:
        count(beginning(part), len(part), 0)
    return [Given(*total) for total in totals]
