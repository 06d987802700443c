"""Read a configuration from flags and a recipe, and show which flags there are."""

from __future__ import annotations

import argparse
import importlib.util
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

from p2p_llm_forge.config.fields import Options, option
from p2p_llm_forge.errors import ForgeError, Problems, nearest

Config = TypeVar("Config", bound=Options)


def parse(
    config_class: type[Config],
    argv: list[str],
    script: str,
    check: Callable[[Config], Problems] | None = None,
) -> Config:
    """Read a config from the command line and the recipe that `--config` names.

    The recipe's keys are the flags' names (dashes or underscores). Raises one ForgeError with all
    problems: keys and flags that do not exist (with the nearest name), values of the wrong type,
    and what `check` (as a rule its own
    `problems`) finds in the rest. `--help` exits with 0.
    """
    problems = Problems()
    parser = _parser(config_class, script, problems)
    recipe = _last_value(argv, "--config")
    words = [*(_recipe_as_flags(Path(recipe), parser, problems) if recipe else []), *argv]
    namespace, unknown = parser.parse_known_args(words)
    flags = [word for word in unknown if word.startswith("--")]
    for word in flags:
        names = {option(name) for name in _names(parser)}
        problems.require(False, f"unknown argument {word}", nearest(word, names))
    problems.require(
        bool(flags) or not unknown,
        f"arguments that belong to no flag: {' '.join(unknown)}",
        "put the flag before them, and quotes around a value with spaces",
    )
    config = config_class(**vars(namespace))
    for problem in (check or config_class.problems)(config).found:
        problems.require(False, problem.found, problem.fix)
    problems.raise_any()
    return config


def flags_table(config_class: type[Options]) -> str:
    """All flags of a script as a Markdown table, read from the parser itself, for the README.

    Of a config that extends another, only what it adds.
    """
    inherited = {
        name
        for base in config_class.__mro__[1:]
        if "GROUPS" in vars(base)
        for name in getattr(base, "__dataclass_fields__", {})
    }
    rows = ["| flag | default | what it does |", "|---|---|---|"]
    for group in _parser(config_class, "", Problems())._action_groups:
        actions = [action for action in _shown(group) if action.dest not in inherited]
        rows += [f"| **{group.title}** | | |"] if actions else []
        for action in actions:
            names = [_invocation(action), *_aliases(action)]
            default = f"`{action.default}`" if action.default not in (None, "", []) else ""
            if isinstance(action.default, bool):
                default = "on" if action.default else "off"
            text = str(action.help)
            if action.choices:
                text += f" ({', '.join(f'`{choice}`' for choice in action.choices)})"
            rows.append(f"| {'<br>'.join(f'`{name}`' for name in names)} | {default} | {text} |")
    return "\n".join(rows) + "\n"


# --- the parser -----------------------------------------------------------------------------------


def _parser(config_class: type[Options], script: str, problems: Problems) -> Any:
    """HfArgumentParser for the groups of a config; values of a wrong type are noted as problems."""

    class Parser(_hf_argument_parser()):  # type: ignore[misc]
        def error(self, message: str) -> None:
            flag = re.sub(r"argument --(\w+)[^:]*", lambda name: option(name[1]), message)
            problems.require(False, flag, f"see {script} --help")
            problems.raise_any()

        def _get_values(self, action: argparse.Action, words: list[str]) -> Any:
            try:
                return super()._get_values(action, words)
            except argparse.ArgumentError:
                found = f"{option(action.dest)} is '{' '.join(words)}'"
                problems.require(False, found, _what_to_give(action, " ".join(words)))
                return action.default

        def format_epilog(self) -> str:
            return "\n".join(
                f"  {', '.join(_aliases(action))} for {option(action.dest)}"
                for group in self._action_groups
                for action in _shown(group)
                if _aliases(action)
            )

    parser = Parser(
        config_class.GROUPS,
        prog=script,
        usage=f"{script} [--config RECIPE] [--flag VALUE ...]",
        description=(config_class.__doc__ or "").split(":")[0],
        allow_abbrev=False,
        formatter_class=_Help,
    )
    parser.epilog = "Other names that are understood:\n" + parser.format_epilog()
    return parser


class _Help(argparse.RawDescriptionHelpFormatter):
    """Each flag once, with dashes; a default where there is one to show."""

    def _format_action_invocation(self, action: argparse.Action) -> str:
        if action.dest == "help":
            return "-h, --help"
        return f"{_invocation(action)} {_value(action)}".strip()

    def _expand_help(self, action: argparse.Action) -> str:
        text = super()._expand_help(action)
        if action.default in (None, "", [], argparse.SUPPRESS) or isinstance(action.default, bool):
            return text
        return f"{text} (default: {action.default})"

    def add_argument(self, action: argparse.Action) -> None:
        if action.const is not False:  # --no-x is shown with --x
            super().add_argument(action)


def _shown(group: Any) -> Iterator[argparse.Action]:
    for action in group._group_actions:
        if action.dest != "help" and action.const is not False:
            yield action


def _invocation(action: argparse.Action) -> str:
    """The flag as it is typed: `--hosts`, `--save-in-background, --no-save-in-background`."""
    name = f"{option(action.dest)} {action.metavar or ''}".strip()
    return f"{name}, {option('no_' + action.dest)}" if action.default is True else name


def _value(action: argparse.Action) -> str:
    """What stands for its value in `--help`; nothing for one that needs none."""
    if action.choices:
        return f"{{{','.join(map(str, action.choices))}}}"
    words: dict[Any, str] = {int: "N", float: "X", str: "TEXT"}
    return "" if action.metavar else words.get(action.type, "")


def _aliases(action: argparse.Action) -> list[str]:
    """Its names in Hugging Face's scripts, with underscores."""
    own = (option(action.dest), f"--{action.dest}")
    words = ["--" + word.removeprefix("--").replace("-", "_") for word in action.option_strings]
    return [word for word in dict.fromkeys(words) if word not in own]


def _names(parser: Any) -> set[str]:
    """All names of flags, with underscores."""
    return {
        word.removeprefix("--").replace("-", "_")
        for action in parser._actions
        for word in action.option_strings
        if word.startswith("--")
    } - {"help"}


def _what_to_give(action: argparse.Action, given: str) -> str:
    if action.choices:
        return nearest(given, action.choices)
    return {int: "give a whole number", float: "give a number"}.get(
        action.type, "give true or false"
    )  # type: ignore[call-overload]


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


def _recipe_as_flags(path: Path, parser: Any, problems: Problems) -> list[str]:
    """The recipe's keys and values as command-line words, so that both are read alike."""
    words: list[str] = []
    known = _names(parser) - {"config"}
    for key, value in _read_recipe(path).items():
        name = str(key).replace("-", "_")
        if name not in known:
            problems.require(False, f"{path}: unknown key '{key}'", nearest(name, known))
        elif isinstance(value, list):
            words += [f"--{name}", *map(str, value)]
        elif isinstance(value, dict):
            # `config_overrides: {hidden_size: 64}` reads better in YAML than one long string.
            words += [f"--{name}={','.join(f'{k}={v}' for k, v in value.items())}"]
        elif value is not None:
            words += [f"--{name}={value}"]
    return words


def _read_recipe(path: Path) -> dict[Any, Any]:
    import yaml

    if not path.is_file():
        raise ForgeError(
            f"--config {path}: no such file",
            "check the path; recipes that come with the project lie in recipes/",
        )
    try:
        recipe = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ForgeError(
            f"--config {path} is not YAML: {error}", "write a `key: value` line for each flag"
        ) from error
    if not isinstance(recipe, dict | None):
        raise ForgeError(
            f"--config {path} holds a {type(recipe).__name__}", "write `key: value` lines"
        )
    return recipe or {}
