"""Read a configuration from flags and a recipe, and show which flags there are."""

from __future__ import annotations

import argparse
import importlib.util
import re
import sys
import textwrap
from collections.abc import Callable, Iterator
from dataclasses import Field, fields
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args, get_origin, get_type_hints

from p2p_llm_forge.config.fields import Options, option
from p2p_llm_forge.config.yaml_file import read_yaml
from p2p_llm_forge.errors import Problems, nearest

Config = TypeVar("Config", bound=Options)


def parse(
    config_class: type[Config],
    argv: list[str],
    script: str,
    check: Callable[[Config], Problems] | None = None,
) -> Config:
    """Read a config from the command line and the recipe that `--config` names.

    The recipe's keys are the flags' names (dashes or underscores). Raises one ForgeError with all
    problems: flags and keys that do not exist (with the nearest name), and what `check`, by
    default `problems` of the config, finds in the values. `--help` prints all flags.
    """
    if {"-h", "--help"} & set(argv):
        print(_help(config_class, script))
        sys.exit(0)
    problems = Problems()
    parser = _parser(config_class, script, problems)
    recipe = _last_value(argv, "--config")
    fix = "give a recipe's path, or leave --config out"
    problems.require(recipe != "", "--config is empty", fix)
    words = [*(_recipe_as_flags(recipe, parser, problems) if recipe else []), *argv]
    namespace, unknown = _parsed(parser, words, problems)
    flags = [word for word in unknown if word.startswith("--")]
    names = {option(name) for name in _names(parser)}
    for word in flags:
        problems.require(False, f"unknown argument {word}", nearest(word, names))
    problems.require(
        bool(flags) or not unknown,
        f"arguments that belong to no flag: {' '.join(unknown)}",
        "put the flag before them, and quotes around a value with spaces",
    )
    config = config_class(**vars(namespace))
    problems.found += (check or config_class.problems)(config).found
    problems.raise_any()
    return config


# --- what flags there are -------------------------------------------------------------------------


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


def _help(config_class: type[Options], script: str) -> str:
    lines = [f"usage: {script} [--config RECIPE] [--FLAG VALUE ...]", "", str(config_class.__doc__)]
    others = []
    for group in config_class.GROUPS:
        lines += ["", f"{group.heading}:"]
        for field, choices, kind in _flags(group):
            value = f"{{{','.join(choices)}}}" if choices else kind
            text = field.metadata["help"]
            if _shows_default(field) and not isinstance(field.default, bool):
                text += f" (default: {field.default})"
            lines.append(f"  {_written(field)} {value}".rstrip())
            lines += textwrap.wrap(text, 94, initial_indent=" " * 6, subsequent_indent=" " * 6)
            others += [f"  {alias} for {option(field.name)}" for alias in _aliases(field)]
    return "\n".join([*lines, "", "Other names that are understood:", *others])


def _flags(group: type[Options]) -> Iterator[tuple[Field, tuple[str, ...], str]]:
    """Each field of a group, the values to choose from, and a word for any other value."""
    words: dict[Any, str] = {int: "N", float: "X", str: "TEXT"}
    hints = get_type_hints(group)
    for field in fields(group):
        kinds = get_args(hints[field.name]) or (hints[field.name],)
        choices = kinds if get_origin(hints[field.name]) is Literal else ()
        yield field, choices, "" if "metavar" in field.metadata else words.get(kinds[0], "")


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


# --- the parser -----------------------------------------------------------------------------------


def _parser(config_class: type[Options], script: str, problems: Problems) -> Any:
    """HfArgumentParser for the groups of a config; a value of a wrong type is kept as its text."""

    class Parser(_hf_argument_parser()):  # type: ignore[misc]
        def error(self, message: str) -> None:
            name = re.match(r"argument --(\w+)[^:]*", message)
            found = message.replace(name[0], option(name[1])) if name else message
            problems.require(False, found, f"see {script} --help")
            raise _Unread(name[1] if name else "")

        def _get_values(self, action: argparse.Action, words: list[str]) -> Any:
            try:
                return super()._get_values(action, words)
            except argparse.ArgumentError:
                return " ".join(words)  # the checks of the config find it, with all others

    return Parser(config_class.GROUPS, prog=script, allow_abbrev=False, add_help=False)


class _Unread(Exception):
    """A flag that could not be read, by its name; its problem is noted."""


def _parsed(parser: Any, words: list[str], problems: Problems) -> tuple[argparse.Namespace, Any]:
    """What is read of the words; a flag without its value is left out, and the rest is read."""
    while True:
        try:
            return parser.parse_known_args(words)
        except _Unread as flag:
            names = parser._option_string_actions.get(f"--{flag}")
            left = [word for word in words if word not in (names.option_strings if names else ())]
            if left == words:
                problems.raise_any()
            words = left


def _names(parser: Any) -> set[str]:
    """All names of flags, with underscores."""
    words = (word for action in parser._actions for word in action.option_strings)
    return {word.removeprefix("--").replace("-", "_") for word in words}


def _hf_argument_parser() -> type:
    """transformers.HfArgumentParser without the package around it.

    `import transformers` costs over a second (5.23); its argument parser needs only the standard
    library and PyYAML, and `--help` should answer at once.
    """
    if "transformers" not in sys.modules:
        package = importlib.util.find_spec("transformers")
        if package and package.submodule_search_locations:
            file = Path(package.submodule_search_locations[0]) / "hf_argparser.py"
            spec = importlib.util.spec_from_file_location("p2p_llm_forge._hf_argparser", file)
            if file.exists() and spec and spec.loader:
                module = importlib.util.module_from_spec(spec)
                spec.loader.exec_module(module)
                return module.HfArgumentParser
    from transformers import HfArgumentParser

    return HfArgumentParser


# --- recipes --------------------------------------------------------------------------------------


def _last_value(argv: list[str], name: str) -> str | None:
    """The last value that `argv` gives to a flag, as `--name value` or `--name=value`."""
    value = None
    for word, following in zip(argv, [*argv[1:], None], strict=False):
        if word == name:
            value = following
        elif word.startswith(name + "="):
            value = word.split("=", 1)[1]
    return value


def _recipe_as_flags(path: str, parser: Any, problems: Problems) -> list[str]:
    """The recipe's keys and values as command-line words, so that both are read alike."""
    fix = "check the path; recipes that come with the project lie in recipes/"
    words: list[str] = []
    known = _names(parser) - {"config"}
    lists = {action.dest for action in parser._actions if action.nargs == "+"}
    for key, value in read_yaml("--config", path, fix).items():
        name = str(key).replace("-", "_")
        if name not in known:
            problems.require(False, f"{path}: unknown key '{key}'", nearest(name, known))
        elif isinstance(value, list) and name in lists:
            words += [f"--{name}", *map(str, value)]
        elif isinstance(value, list):
            problems.require(False, f"{path}: {key} holds a list", "give one value")
        elif isinstance(value, dict) and name != "config_overrides":
            problems.require(False, f"{path}: {key} holds keys of its own", "give one value")
        elif isinstance(value, dict):
            # `config_overrides: {hidden_size: 64}` reads better in YAML than one long string.
            words += [f"--{name}={','.join(f'{k}={v}' for k, v in value.items())}"]
        elif value is not None:
            words += [f"--{name}={value}"]
    return words
