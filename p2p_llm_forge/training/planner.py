"""What to train in a given time: arithmetic on the speed of the peers and the size of the text."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

from p2p_llm_forge.config.train import WEIGHT_DECAY
from p2p_llm_forge.errors import ForgeError
from p2p_llm_forge.model.shape import has_attention, shape_of
from p2p_llm_forge.shapes import is_flag, is_number, is_positive, require_shape
from p2p_llm_forge.training.law import bits_per_byte

DEPTHS = (1, 2, 3, 4, 5, 6, 8, 10, 12, 16, 20, 24, 32)  # among which is chosen
# Parts of the time after which a run could end: a small text is not read until known by heart.
PARTS = tuple(0.85**n for n in range(90))
READINGS = tuple(1.05**n for n in range(95))  # of a text, up to a hundred
MOST_PER_BYTE = 4  # products of a token for a byte of the text; larger models were hardly measured
AVERAGED = 0.7  # readings of a text, over which the weights are an average
MOST_DECAYED = 0.05  # of a weight in an update, whatever the text
MOST_READINGS = 4  # of a text by a loaded model: more of them were not measured
LEAST_TOKENS, LEAST_BYTES = 2_000, 8_000  # to learn from
SPARE = 1.5  # times as much text as would just do: what is held out of it is left to chance
# Tokens of an update: small ones are best for short runs, larger ones cost less a token and are
# best for long runs; the size that is best grows about as the root of what is read.
UPDATE_TOKENS, AT_TOKENS = 1024, 250_000
SMALLEST_UPDATE, LARGEST_UPDATE = 512, 2**19
MEGABYTE = 1e6
LONG_TEXT = 250_000  # bytes, of which there are hundreds of blocks of 256 tokens

# What a run has on record, and what each of them looks like there.
CHOICES = ("chosen", "twice_the_time", "one_more_peer")
SHAPE = {
    **{"depth": (None, is_positive), "tokens": is_positive, "update_tokens": is_positive},
    **{"epochs": is_number, "seconds": is_number},
    **{"bits_per_byte": (None, is_number), "is_cut_short": (None, is_flag)},
}


@dataclass(frozen=True)
class Text:
    """What there is to learn from, as it lies prepared."""

    tokens: int
    bytes_per_token: float
    vocabulary: int
    sequence_length: int
    compressed: float  # bits per byte: see law.py


@dataclass(frozen=True)
class Choice:
    """What a run is to be, and what it is expected to come to."""

    depth: int | None  # None: the model was given
    tokens: int  # read
    epochs: float
    update_tokens: int
    bits_per_byte: float | None  # None: a loaded model, of which the law knows nothing
    seconds: float  # of the updates
    is_cut_short: bool = False  # more would only be learnt by heart, or is not known to help

    @property
    def updates(self) -> int:
        return max(1, self.tokens // self.update_tokens)


def products(depth: int, text: Text) -> int:
    """Parameters that a token is multiplied by, in the layers and the head of the default model."""
    width = shape_of(depth)["hidden_size"]
    return depth * 13 * width**2 + width * text.vocabulary


def work(depth: int, text: Text) -> int:
    """Multiplications of a token's forward: those, and attention's."""
    width, attending = shape_of(depth)["hidden_size"], sum(has_attention(depth))
    return products(depth, text) + attending * width * text.sequence_length


def token_seconds(measured: Mapping[int, float], text: Text) -> dict[int, float]:
    """Seconds of a token at every depth, from those at a few: a line over the work of a token.

    measured: at one depth or more. No depth is taken to be faster than a shallower one.
    """
    xs = [work(depth, text) for depth in measured]
    ys = list(measured.values())
    slope = ys[0] / xs[0] if len(xs) == 1 else _slope(xs, ys)
    base = sum(ys) / len(ys) - slope * sum(xs) / len(xs)
    if slope <= 0 or base < 0:  # no line through what noise has left: in proportion
        slope, base = sum(ys) / sum(xs), 0.0
    return {depth: base + slope * work(depth, text) for depth in DEPTHS}


def _slope(xs: Sequence[float], ys: Sequence[float]) -> float:
    """Of the line of least squares of the relative errors' weights 1/y."""
    weights = [1 / y**2 for y in ys]
    total = sum(weights)
    x_mean = sum(w * x for w, x in zip(weights, xs, strict=True)) / total
    y_mean = sum(w * y for w, y in zip(weights, ys, strict=True)) / total
    triples = list(zip(weights, xs, ys, strict=True))
    spread = sum(w * (x - x_mean) ** 2 for w, x, _ in triples)
    return sum(w * (x - x_mean) * (y - y_mean) for w, x, y in triples) / spread


def choose(token_s: Mapping[int, float], text: Text, seconds: float) -> Choice:
    """The depth with the lowest loss to expect after `seconds` of updates.

    token_s: by depth, of all peers together.
    """
    most = max(products(1, text), MOST_PER_BYTE * text.tokens * text.bytes_per_token)
    sizes = {depth: products(depth, text) for depth in token_s}
    choices = [
        choice_at(depth, size, token_s[depth], text, seconds)
        for depth, size in sizes.items()
        if size <= most
    ]
    return min(choices, key=_loss)


def _loss(choice: Choice) -> float:
    assert choice.bits_per_byte is not None  # of a model from scratch something is expected
    return choice.bits_per_byte


def choice_at(depth: int | None, size: int, token_s: float, text: Text, seconds: float) -> Choice:
    """What a model of one size comes to in that time, or in the part of it that is best."""

    def expected(tokens: float) -> float:
        read, unique = tokens * text.bytes_per_token, text.tokens * text.bytes_per_token
        return bits_per_byte(size, read, unique, text.compressed)

    part = min(PARTS, key=lambda part: expected(part * seconds / token_s))
    tokens = max(1, int(part * seconds / token_s))
    return Choice(
        depth,
        tokens=tokens,
        epochs=tokens / text.tokens,
        update_tokens=update_tokens_for(tokens),
        bits_per_byte=expected(tokens),
        seconds=tokens * token_s,
        is_cut_short=part < 1,
    )


def choice_of_loaded(token_s: float, text: Text, seconds: float) -> Choice:
    """What a loaded model reads in that time: no more than is known to help."""
    in_time = max(1, int(seconds / token_s))
    tokens = min(in_time, MOST_READINGS * text.tokens)
    return Choice(
        None,
        tokens=tokens,
        epochs=tokens / text.tokens,
        update_tokens=update_tokens_for(tokens),
        bits_per_byte=None,
        seconds=tokens * token_s,
        is_cut_short=tokens < in_time,
    )


def most_tokens(size: int, text: Text) -> int:
    """Tokens after which a model of this size would only learn the text by heart."""
    unique = text.tokens * text.bytes_per_token

    def expected(readings: float) -> float:
        return bits_per_byte(size, readings * unique, unique, text.compressed)

    return int(min(READINGS, key=expected) * text.tokens)


def update_tokens_for(tokens: int) -> int:
    """Tokens of an update of a run that reads so many: a power of two."""
    best = UPDATE_TOKENS * math.sqrt(tokens / AT_TOKENS)
    return min(LARGEST_UPDATE, max(SMALLEST_UPDATE, 2 ** round(math.log2(best))))


def batch_size_for(update_tokens: int, sequence_length: int, unit: int, least: int = 1) -> int:
    """Blocks of an update: about so many tokens, divisible by `unit`, and at least `least`."""
    return unit * max(math.ceil(least / unit), round(update_tokens / sequence_length / unit))


def in_updates(choice: Choice, update_tokens: int, fewest: int) -> Choice:
    """The choice in whole updates of the batch that is really taken.

    fewest: that are worth a start; but for them, too, a loaded model does not read the text more
    often than is known to help.
    """
    updates = max(fewest, choice.tokens // update_tokens)
    if choice.bits_per_byte is None:
        most = round(MOST_READINGS * choice.tokens / choice.epochs)
        updates = max(1, min(updates, most // update_tokens))
    tokens = updates * update_tokens
    times = tokens / choice.tokens
    return replace(
        choice,
        tokens=tokens,
        epochs=times * choice.epochs,
        update_tokens=update_tokens,
        seconds=times * choice.seconds,
    )


def weight_decay_for(choice: Choice, learning_rate: float) -> float:
    """Of a model from scratch that becomes what was chosen.

    Weights that decay are an average of about the last 1 / (rate x decay) updates. How many are
    best goes by readings of the text (arXiv 2405.13698), and an average over less than one keeps a
    model from learning its text by heart.
    """
    updates_of_reading = choice.updates / choice.epochs
    in_update = min(MOST_DECAYED, 1 / (AVERAGED * updates_of_reading))
    return max(WEIGHT_DECAY, float(f"{in_update / learning_rate:.2g}"))


def text_settings(size: int) -> tuple[int, int]:
    """Vocabulary and tokens of a block for a text of so many bytes.

    Raises ForgeError for a text that is too small for any model.
    """
    if size < LEAST_BYTES:
        raise ForgeError(
            f"the text has {size:,} bytes, which is too small for any model",
            f"give a text of at least {LEAST_BYTES:,} bytes",
        )
    vocabulary = 2 ** round(math.log2(1024 * math.sqrt(size / MEGABYTE)))
    return min(32768, max(512, vocabulary)), 128 if size < LONG_TEXT else 256


def require_text(text: Text) -> None:
    """Raise ForgeError for prepared data that are too small for any model."""
    if text.tokens < LEAST_TOKENS:
        # The end of a split that fills no block is not learnt from.
        times = SPARE * (LEAST_TOKENS + text.sequence_length) / max(1, text.tokens)
        raise ForgeError(
            f"there are {text.tokens:,} tokens to learn from, which is too little for any model:"
            f" it takes {LEAST_TOKENS:,}",
            f"prepare at least {math.ceil(10 * times) / 10:g} times as much text",
        )


def in_words(choice: Choice, twice: Choice, with_peer: Choice) -> list[str]:
    """What was chosen and what more would bring, for a person.

    Losses; of a loaded model how often it would read the text.
    """
    model = "the model as given" if choice.depth is None else f"depth {choice.depth}"
    plan = (
        f"plan      {model}, about {choice.updates:,} updates of {choice.update_tokens:,} tokens,"
        f" the text {choice.epochs:.1f} times"
    )
    early = "so it ends before the time is over: give more text"
    if choice.bits_per_byte is None:
        more = f"with twice the time {twice.epochs:.1f}, with one more peer {with_peer.epochs:.1f}"
        too_often = f"more often is not known to help, {early}"
        return [f"{plan}; {too_often if choice.is_cut_short else more}"]
    if choice.is_cut_short:
        plan += f"; more would be learnt by heart, {early}"
    elif choice.epochs > 4:
        plan += "; more text would bring more than time"
    losses = [
        f"{what} {one.bits_per_byte:.3f}" + (f" (depth {one.depth})" if one.depth else "")
        for what, one in (("twice the time", twice), ("one more peer", with_peer))
    ]
    return [
        plan,
        f"expected  about {choice.bits_per_byte:.3f} bits per byte, by a law of other texts;"
        f" {', '.join(losses)}",
    ]


def words_of(plan: Mapping[str, Any]) -> list[str]:
    """`in_words` of what a run has on record; nothing where that lacks what is needed."""
    names = [field.name for field in fields(Choice)]
    try:
        require_shape(plan, dict.fromkeys(CHOICES, SHAPE), "plan")
        records = [plan[one] for one in CHOICES]
        return in_words(*(Choice(**{n: one[n] for n in names if n in one}) for one in records))
    except (ValueError, TypeError):
        return []


def as_record(choices: Iterable[Choice]) -> list[dict[str, float | int | None]]:
    """Choices as JSON, for the run's own files."""
    return [vars(replace(choice)) for choice in choices]
