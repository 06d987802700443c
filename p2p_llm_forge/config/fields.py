"""How an option is declared: a dataclass field with a help text, in a group with its checks."""

from __future__ import annotations

import dataclasses
import math
import os
from typing import Any, ClassVar, Literal, get_args, get_origin, get_type_hints

from p2p_llm_forge.config.other_names import Meaning
from p2p_llm_forge.errors import Problems, nearest

PATHS = ("model_name", "tokenizer", "resume", "describe", "write_configs")  # or names of the Hub
READ = ("dataset_path", "validation_path")  # lists of files, whose names may hold any bytes
EITHER = ("dataset_path", "output_dir", "model_name")  # on all ranks of a run, or on none
MOST = 2**53  # what every number in JSON can count to
MOST_SECONDS = 10**9  # what clocks can count


def flag(
    default: Any, help: str, *aliases: str, metavar: str | None = None, alone: str | None = None
) -> Any:
    """A dataclass field that becomes a command-line flag: default, help text, aliases.

    aliases: names of Hugging Face's scripts, with underscores; dashes are accepted as well.
    alone: what the flag without a value stands for, where it may stand without one.
    """
    both = [word for alias in aliases for word in dict.fromkeys((alias, _dashed(alias)))]
    metadata: dict[str, Any] = {"help": help, "aliases": both}
    if metavar:
        metadata["metavar"] = metavar
    if alone:
        metadata |= {"nargs": "?", "const": alone}
    if isinstance(default, list):
        return dataclasses.field(default_factory=lambda: list(default), metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


def option(field_name: str) -> str:
    """A field's name as its flag is written."""
    return _dashed("--" + field_name)


def _dashed(name: str) -> str:
    return "--" + name.removeprefix("--").replace("_", "-")


@dataclasses.dataclass
class Options:
    """A group of options. A subclass is one heading of `--help`, and knows what may be wrong.

    A whole configuration is built of groups by inheritance and lists them, in order, as GROUPS.
    """

    heading: ClassVar[str] = ""  # in `--help-all`
    shown_with: ClassVar[str] = ""  # the heading in `--help`, where that is not its own
    GROUPS: ClassVar[list[type[Options]]] = []
    PER_RANK: ClassVar[list[str]] = []  # may differ between the ranks of one run
    COMMON: ClassVar[list[str]] = []  # what `--help` shows; `--help-all` shows all
    OTHER_NAMES: ClassVar[dict[str, Meaning]] = {}  # of other programs' flags, with underscores

    def __post_init__(self) -> None:
        # From a notebook, paths may be Paths, one path a plain string, and sizes a dict.
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if isinstance(value, os.PathLike):
                value = os.fspath(value)
            if isinstance(value, str) and field.default is dataclasses.MISSING:
                value = [value]
            if isinstance(value, dict):
                value = ",".join(f"{key}={item}" for key, item in value.items())
            setattr(self, field.name, value)

    def problems(self) -> Problems:
        """Every problem that can be seen without touching a file or a library."""
        problems = Problems()
        checked = dataclasses.replace(self, **self._of_wrong_type(problems))
        for field in dataclasses.fields(checked):
            value = getattr(checked, field.name)
            for text in value if isinstance(value, list) else [value]:
                if isinstance(value, list) and field.name in READ and isinstance(text, str):
                    text = text.encode("utf-8", "replace").decode()
                _require_writable(field.name, text, problems)
        for group in self.GROUPS:
            group.check(checked, problems)
        checked.check_together(problems)
        return problems

    @classmethod
    def other_names(cls) -> dict[str, Meaning]:
        """What the flags of other programs mean here, by name."""
        groups = (group.OTHER_NAMES for group in cls.GROUPS)
        return {name: one for names in (*groups, cls.OTHER_NAMES) for name, one in names.items()}

    def check(self, problems: Problems) -> None:
        """Note what is wrong with the values of this group, each of which is of its type."""

    def check_together(self, problems: Problems) -> None:
        """Note what options of several groups ask for that does not go together."""

    def shared_settings(self) -> dict[str, Any]:
        """The settings that must be the same on every rank of a run.

        Of those that each rank has for itself, whether it has one, where that decides what all do.
        """
        settings = as_dict(self)
        per_rank = {name for group in self.GROUPS for name in group.PER_RANK}
        given = {name: "one" if settings[name] else "none" for name in EITHER if name in settings}
        return given | {key: value for key, value in settings.items() if key not in per_rank}

    def _of_wrong_type(self, problems: Problems) -> dict[str, Any]:
        """Note every value that is not of its field's type: a notebook can pass anything.

        Returns values that pass the checks in their place, so that the others are checked too.
        """
        instead = {}
        hints = get_type_hints(type(self))
        for field in dataclasses.fields(self):
            value, hint = getattr(self, field.name), hints[field.name]
            if _is_of(value, hint):
                continue
            choices = get_args(hint) if get_origin(hint) is Literal else ()
            fix = nearest(str(value), choices) if choices else f"give {_in_words(hint)}"
            problems.require(False, f"{option(field.name)} is {value!r}", fix)
            given: Any = ["given"] if hint == list[str] else "given"
            has_default = field.default not in (dataclasses.MISSING, "")
            instead[field.name] = field.default if has_default else given
        return instead


def _is_of(value: Any, hint: Any) -> bool:
    if get_origin(hint) is Literal:
        return value in get_args(hint)
    classes = {list} if hint == list[str] else set(get_args(hint) or (hint,))
    is_whole = isinstance(value, int) and not isinstance(value, bool)
    return type(value) in classes or (float in classes and is_whole)


def _in_words(hint: Any) -> str:
    words = {int: "a whole number", float: "a number", bool: "true or false", str: "a text"}
    kinds = () if hint == list[str] else get_args(hint) or (hint,)
    return " or ".join(words[kind] for kind in kinds if kind in words) or "a list of texts"


def require_above_0(options: Options, problems: Problems, *names: str, most: float = MOST) -> None:
    """Each value must be a number above 0 and below `most`, or None."""
    for name in names:
        value = getattr(options, name)
        holds = value is None or 0 < value < most
        problems.require(holds, f"{option(name)} is {value}", _fix_of(value, most))


def _fix_of(value: float | None, most: float) -> str:
    is_too_much = value is not None and most <= value < math.inf
    return f"use less than {most}" if is_too_much else "use a finite number above 0"


def require_at_least(least: int, options: Options, problems: Problems, *names: str) -> None:
    """Each value must be a finite number of at least `least`, or None."""
    for name in names:
        value = getattr(options, name)
        found, holds = f"{option(name)} is {value}", value is None or least <= value < math.inf
        problems.require(holds, found, f"use {least} or more")
        problems.require(not holds or value is None or value < MOST, found, f"use less than {MOST}")


def require_between(
    bounds: tuple[int, int], options: Options, problems: Problems, *names: str
) -> None:
    """Each value must be a number from the first to the second bound, or None."""
    least, most = bounds
    for name in names:
        value = getattr(options, name)
        if value is not None:
            fix = f"use {most} or less" if value > most else f"use {least} or more"
            problems.require(least <= value <= most, f"{option(name)} is {value}", fix)


def require_seconds(options: Options, problems: Problems, *names: str) -> None:
    """Each value must be a time above 0 that clocks can count, or None."""
    for name in names:
        value = getattr(options, name)
        holds = value is None or 0 < value < MOST_SECONDS
        problems.require(holds, f"{option(name)} is {value}", _fix_of(value, MOST_SECONDS))


def _require_writable(name: str, text: Any, problems: Problems) -> None:
    """A text must be UTF-8, for it is written to files, and hold nothing that ends a path."""
    if isinstance(text, str):
        is_utf8 = all(not "\ud800" <= letter <= "\udfff" for letter in text)
        found, fix = f"{option(name)} {text!r}", "write it in UTF-8, without NUL characters"
        problems.require(is_utf8, f"{found} holds bytes that are not UTF-8", fix)
        is_path = name.endswith(("_path", "_dir", "_file")) or name in PATHS
        longest = max((len(part.encode("utf-8", "replace")) for part in text.split("/")), default=0)
        is_short = not is_path or (longest <= 255 and len(text) < 4096)
        problems.require(
            is_short, f"{option(name)} {text[:40]}... is too long", "use a shorter one"
        )
        problems.require("\0" not in text, f"{found} holds a NUL character", fix)


def as_dict(config: Any) -> dict[str, Any]:
    """The config as plain JSON values."""
    return dataclasses.asdict(config)


def multiples_near(value: int, unit: int) -> str:
    """The multiples of `unit` next to `value`, but for 0, as a choice: "90 or 120"."""
    below = value // unit * unit
    return " or ".join(str(number) for number in (below, below + unit) if number)
