"""Which flags there are, in words: one screen of `--help`, all of `--help-all`, and the tables."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Iterator
from dataclasses import Field, fields
from typing import Any, Literal, get_args, get_origin, get_type_hints

from p2p_llm_forge.config.fields import Options, option

WIDTH = 100  # columns of the screen that `--help` fits on
WIDEST_FLAG = 30  # columns, of a flag with its value on that screen
ENDS_OF_CLAUSES = (r"(?<=;)\s|\s(?=\()", r"(?<=[,:])\s")  # the better ones first


def flags_table(config_class: type[Options]) -> str:
    """All flags of a script as a Markdown table, for docs/flags.md.

    Of a config that extends another, only what it adds.
    """
    known = [vars(base)["GROUPS"] for base in config_class.__mro__[1:] if "GROUPS" in vars(base)]
    rows = ["| flag | default | what it does |", "|---|---|---|"]
    for group in config_class.GROUPS:
        if any(group in groups for groups in known):
            continue
        rows.append(f"| **{group.heading}** | | |")
        for field, choices, _ in _flags(group):
            names = "<br>".join(f"`{name}`" for name in [_written(field), *_aliases(field)])
            text = field.metadata["help"]
            text += f" ({', '.join(f'`{choice}`' for choice in choices)})" if choices else ""
            default = f"`{field.default}`" if _shows_default(field) else ""
            if isinstance(field.default, bool):
                default = "on" if field.default else "off"
            rows.append(f"| {names} | {default} | {text} |")
    return "\n".join(rows) + "\n"


def usage(config_class: type[Options], script: str) -> str:
    """The first lines of `--help` and of `--help-all`."""
    recipe = " [--config RECIPE]" if hasattr(config_class, "config") else ""
    return f"usage: {script}{recipe} [--FLAG VALUE ...]\n{config_class.__doc__}"


def help_in_short(config_class: type[Options], script: str) -> str:
    """What `--help` prints: the flags that are COMMON, a line each, on one screen.

    Where no group names any, all.
    """
    lines = [usage(config_class, script)]
    shown = {name for one in (config_class, *config_class.GROUPS) for name in one.COMMON}
    shown = {*vars(config_class).get("COMMON", shown)}
    for group in config_class.GROUPS:
        common = [one for one in _flags(group) if not shown or one[0].name in shown]
        heading = f"{group.shown_with or group.heading}:"
        lines += [heading] * bool(common and heading not in lines)
        for field, choices, kind in common:
            value = field.metadata.get("metavar") or _value(choices, kind)
            flag = f"  {option(field.name)} {value}".rstrip()
            flag = flag if len(flag) <= WIDEST_FLAG else f"  {option(field.name)} TEXT"
            text = in_short(field.metadata["help"], WIDTH - WIDEST_FLAG - 1)
            lines.append(f"{flag:{WIDEST_FLAG}} {text}")
    return "\n".join([*lines, f"All flags, and other names for them: {script} --help-all"])


def in_short(text: str, room: int) -> str:
    """As many of its clauses as there is room for; where not even one fits, as many words."""
    if len(text) <= room:
        return text
    for pattern in ENDS_OF_CLAUSES:
        cuts = [text[: end.start()].rstrip(" ,;:") for end in re.finditer(pattern, text)]
        if fitting := [
            one for one in cuts if len(one) <= room and one.count("(") == one.count(")")
        ]:
            return fitting[-1]
    return textwrap.shorten(text, room, placeholder=" ...")


def help_in_full(config_class: type[Options], script: str, others: dict[str, str]) -> str:
    """What `--help-all` prints: every flag with all that is known of it.

    others: names of other programs, and what each stands for here.
    """
    lines = [usage(config_class, script)]
    for group in config_class.GROUPS:
        lines += ["", f"{group.heading}:"]
        for field, choices, kind in _flags(group):
            text = field.metadata["help"]
            if _shows_default(field) and not isinstance(field.default, bool):
                text += f" (default: {field.default})"
            lines.append(f"  {_written(field)} {_value(choices, kind)}".rstrip())
            lines += textwrap.wrap(text, 94, initial_indent=" " * 6, subsequent_indent=" " * 6)
            others = {alias[2:]: option(field.name) for alias in _aliases(field)} | others
            others.pop(field.name, None)
    pairs = [f"--{name} for {meaning}" for name, meaning in sorted(others.items())]
    return "\n".join([*lines, "", "Other names that are understood:", *(f"  {p}" for p in pairs)])


def _flags(group: type[Options]) -> Iterator[tuple[Field, tuple[str, ...], str]]:
    """Each field of a group, the values to choose from, and a word for any other value."""
    words: dict[Any, str] = {int: "N", float: "X", str: "TEXT"}
    hints = get_type_hints(group)
    for field in fields(group):
        kinds = get_args(hints[field.name]) or (hints[field.name],)
        choices = kinds if get_origin(hints[field.name]) is Literal else ()
        yield field, choices, "" if "metavar" in field.metadata else words.get(kinds[0], "")


def _value(choices: tuple[str, ...], kind: str) -> str:
    """What stands for a value."""
    return f"{{{','.join(choices)}}}" if choices else kind


def _written(field: Field) -> str:
    """The flag as it is typed: `--hosts`, `--save-in-background, --no-save-in-background`."""
    if field.default is True:
        return f"{option(field.name)}, {option('no_' + field.name)}"
    return f"{option(field.name)} {field.metadata.get('metavar', '')}".rstrip()


def _aliases(field: Field) -> list[str]:
    """Its other names, each once, with underscores, as Hugging Face's scripts write them."""
    return list(
        dict.fromkeys("--" + name[2:].replace("-", "_") for name in field.metadata["aliases"])
    )


def _shows_default(field: Field) -> bool:
    """Whether its default says something."""
    return isinstance(field.default, bool | int | float | str) and field.default != ""
