"""What people type who know other programs: words that do the same here, or an answer.

A group of options, or a whole configuration, lists as OTHER_NAMES what the flags of Hugging Face's
scripts and of nanoGPT mean in it, by name (underscores): a Meaning, made by the functions below.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

DONE = "what is done anyway"
YES, NO = {"true", "yes", "y", "t", "1", "on"}, {"false", "no", "n", "f", "0", "off"}


@dataclass(frozen=True)
class Typed:
    """A flag as it was typed. name: without dashes; value: "true" where none was given."""

    name: str
    value: str
    has_value: bool
    others: Mapping[str, str]  # by name, all that was typed, this flag too

    def is_on(self) -> bool:
        return self.value.lower() in YES

    def has(self, *names: str) -> bool:
        """Whether one of these was typed as well."""
        return any(name in self.others for name in names)

    def value_words(self) -> list[str]:
        """The value as it is typed, or nothing."""
        return [self.value] * self.has_value


class Answer(Exception):
    """There is no such flag here; the text is the fix."""


@dataclass(frozen=True)
class Meaning:
    """What a name of another program stands for here."""

    words: Callable[[Typed], list[str]]  # to be typed in its place; may raise Answer
    is_switch: bool = False  # takes no value but true and false
    stands_for: str = ""  # in `--help-all`; empty: it is only answered


def renamed(flag: str, is_switch: bool = False) -> Meaning:
    """The same value, by our name for it."""
    return Meaning(lambda typed: [flag, *typed.value_words()], is_switch, flag)


def switch(on: str, off: str = "") -> Meaning:
    """Words for true and for false; none: it is so anyway."""
    return Meaning(lambda typed: (on if typed.is_on() else off).split(), True, on or DONE)


def values(words: Mapping[str, str], otherwise: str) -> Meaning:
    """Words by the value in lower case. otherwise: for any other value, words or `fix: ...`."""

    def chosen(typed: Typed) -> list[str]:
        found = words.get(typed.value.lower(), otherwise)
        if found.startswith("fix: "):
            raise Answer(found.removeprefix("fix: ").format(value=typed.value))
        return [word.format(value=typed.value) for word in found.split()]

    flags = dict.fromkeys(
        word for one in (*words.values(), otherwise) for word in one.split()[:1] if "--" in word
    )
    return Meaning(chosen, False, " or ".join(flags) or DONE)


def answer(fix: str, is_switch: bool = False) -> Meaning:
    """No flag does it with this value alone: the fix says what does. {value}: what was typed."""

    def refused(typed: Typed) -> list[str]:
        raise Answer(fix.format(value=typed.value))

    return Meaning(refused, is_switch)


def unless_off(fix: str, is_off: bool = False) -> Meaning:
    """A switch that changes nothing where it is off, and is answered where it is on."""

    def of(typed: Typed) -> list[str]:
        if typed.is_on() is not is_off:
            raise Answer(fix)
        return []

    return Meaning(of, True, DONE * is_off)


def unless_on(fix: str) -> Meaning:
    """A switch for what is done anyway, which is answered where it is off."""
    return unless_off(fix, is_off=True)


def only(number: float, fix: str) -> Meaning:
    """A number that is this one here; any other is answered."""

    def of(typed: Typed) -> list[str]:
        try:
            is_it = float(typed.value) == number
        except ValueError:
            is_it = False
        if not is_it:
            raise Answer(fix.format(value=typed.value))
        return []

    return Meaning(of, False, DONE)


def if_there(flag: str, fix: str) -> Meaning:
    """Our flag where a file or folder of that name is there; else an answer."""

    def of(typed: Typed) -> list[str]:
        if not Path(typed.value).exists():
            raise Answer(fix.format(value=typed.value))
        return [flag, typed.value]

    return Meaning(of, False, flag)


def all_of(names: str, meaning: Meaning) -> dict[str, Meaning]:
    """The same meaning for several names."""
    return dict.fromkeys(names.split(), meaning)


# --- reading the words of a command line ----------------------------------------------------------


def key_of(word: str) -> str:
    """The name in `--name` or `--name=value`, with underscores; empty if the word is no flag."""
    return word[2:].partition("=")[0].replace("-", "_") if word.startswith("--") else ""


def typed_in(words: Iterable[str]) -> dict[str, str]:
    """Every flag of a command line, by name, with its last value."""
    words = list(words)
    found = {}
    for word, following in zip(words, [*words[1:], "--"], strict=False):
        if key := key_of(word):
            alone = "true" if following.startswith("--") else following
            found[key] = word.split("=", 1)[1] if "=" in word else alone
    return found


def translated(
    words: list[str],
    meanings: Mapping[str, Meaning],
    others: Mapping[str, str],
    answered: Callable[[str, str], None],
) -> list[str]:
    """The words with each other name in words of ours; what is answered is left out.

    others: all that was typed, in the recipe too (see `typed_in`). answered: is called with each
    flag that has only an answer, and the answer.
    """
    at, found = 0, list[str]()
    while at < len(words):
        word = words[at]
        at += 1
        meaning = meanings.get(key_of(word))
        if meaning is None:
            found.append(word)
            continue
        flag, equals, value = word.partition("=")
        has_value = bool(equals)
        if not equals and _is_value(words[at : at + 1], meaning):
            value, has_value = words[at], True
            at += 1
        typed = Typed(key_of(word), value if has_value else "true", has_value, others)
        try:
            found += meaning.words(typed)
        except Answer as fix:
            answered(flag, str(fix))
    return found


def _is_value(following: list[str], meaning: Meaning) -> bool:
    """Whether the next word, if there is one, is the value of a flag."""
    if not following or following[0].startswith("--"):
        return False
    return not meaning.is_switch or following[0].lower() in YES | NO
