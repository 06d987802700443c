"""Read a configuration from flags and a recipe."""

from __future__ import annotations

import argparse
import difflib
import importlib.util
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from p2p_llm_forge.config.fields import Options, option
from p2p_llm_forge.config.help import help_in_full, help_in_short
from p2p_llm_forge.config.other_names import translated, typed_in
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

    The recipe's keys are the flags' names (dashes or underscores); names of other programs are
    read as ours. Raises one ForgeError with all problems: flags and keys that do not exist (with
    the nearest ones), and what `check`, by default `problems` of the config, finds in the values.
    `--help` prints the common flags, `--help-all` all.
    """
    if {"-h", "--help", "--help-all", "--help_all"} & set(argv):
        is_short = {"-h", "--help"} & set(argv)
        others = {name: one.stands_for for name, one in config_class.other_names().items()}
        full = help_in_full(config_class, script, {k: v for k, v in others.items() if v})
        print(help_in_short(config_class, script) if is_short else full)
        sys.exit(0)
    problems = Problems()
    parser = _parser(config_class, script, problems)
    recipe = _last_value(argv, "--config")
    fix = "give a recipe's path, or leave --config out"
    problems.require(recipe != "", "--config is empty", fix)
    words = _recipe_as_flags(recipe, config_class, parser, problems) if recipe else []
    words = _in_our_words([*words, *argv], config_class, script, problems)
    namespace, unknown = _parsed(parser, words, problems)
    _refuse_unknown(unknown, config_class, parser, problems)
    config = config_class(**vars(namespace))
    problems.found += (check or config_class.problems)(config).found
    problems.raise_any()
    return config


def _in_our_words(
    words: list[str], config_class: type[Options], script: str, problems: Problems
) -> list[str]:
    """The words of recipe and command line, with those of other programs as ours."""

    def answered(flag: str, fix: str) -> None:
        problems.require(False, f"{script} has no {flag}", fix)

    return translated(words, config_class.other_names(), typed_in(words), answered)


def _refuse_unknown(
    words: list[str], config_class: type[Options], parser: Any, problems: Problems
) -> None:
    """Note what the parser could not read: flags that do not exist, words that belong to none."""
    flags = [word.partition("=")[0] for word in words if re.match("--?[a-zA-Z]", word)]
    for word in flags:
        fix = _nearest_flags(word, config_class, parser)
        problems.require(False, f"unknown argument {word}", fix)
    if flags or not words:
        return
    fix = "put the flag before them, and quotes around a value with spaces"
    if len(words) == 1 and words[0].endswith((".yaml", ".yml", ".json")):
        fix = f"use --config {words[0]}"
    elif len(words) == 1 and words[0].endswith(".py"):
        fix = "write what it sets as `key: value` lines, and use --config FILE.yaml"
    elif len(words) == 1 and Path(words[0]).exists() and hasattr(config_class, "dataset_path"):
        fix = f"use --dataset-path {words[0]}"
    problems.require(False, f"arguments that belong to no flag: {' '.join(words)}", fix)


def _nearest_flags(word: str, config_class: type[Options], parser: Any) -> str:
    """A fix: the few flags whose names, or other names, look most like `word`."""
    meant = {_plain(name): one.stands_for for name, one in config_class.other_names().items()}
    # An alias leads to its flag; what has only an answer is named itself, if it was but mistyped.
    shown = {name: flag[2:] if " " not in flag else name for name, flag in meant.items() if flag}
    typed = {name: name for name, flag in meant.items() if not flag}
    for action in parser._actions:
        shown |= {_plain(name): _plain(action.option_strings[0]) for name in action.option_strings}
    alike = difflib.get_close_matches(_plain(word), shown, n=6, cutoff=0.6)
    alike += difflib.get_close_matches(_plain(word), typed, n=1, cutoff=0.85)
    parts = {part for part in _plain(word).split("-") if len(part) > 3}
    alike += [name for name in shown if parts & {*name.split("-")}]
    few = list(dict.fromkeys(f"--{(shown | typed)[name]}" for name in alike))[:3]
    every = f"{parser.prog} --help"
    return f"did you mean {' or '.join(few)}? See {every}" if few else f"see {every}"


def _plain(name: str) -> str:
    return name.lstrip("-").replace("_", "-")


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


def _recipe_as_flags(
    path: str, config_class: type[Options], parser: Any, problems: Problems
) -> list[str]:
    """The recipe's keys and values as command-line words, so that both are read alike."""
    fix = "check the path; recipes that come with the project lie in recipes/"
    words: list[str] = []
    known = (_names(parser) | config_class.other_names().keys()) - {"config"}
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
