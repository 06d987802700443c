"""A YAML file that a user, or anyone, has written: small, flat, and read without running it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from p2p_llm_forge.errors import ForgeError

MOST_BYTES = 100_000
DEEPEST = 20  # lists and mappings inside each other
MOST_ALIASES = 16  # each can double what a file grows to


def read_yaml(flag: str, path: str, fix: str) -> dict[Any, Any]:
    """The keys and values of the file that `flag` names; an empty one has none.

    fix: where no such file is there. Raises ForgeError for what is no mapping, and for files that
    take long to read or grow in memory without an end.
    """
    import yaml

    name, file = f"{flag} {path}", Path(path)
    if not file.is_file():
        what = "a folder, not a file" if file.is_dir() else "no file with text to be read"
        raise ForgeError(f"{name}: {what if _exists(file) else 'no such file'}", fix)
    write = "write `key: value` lines"
    try:
        with file.open("rb") as stream:
            text = stream.read(MOST_BYTES + 1).decode("utf-8")
        if len(text) > MOST_BYTES:
            found = f"{name} is longer than {MOST_BYTES:,} bytes"
            raise ForgeError(found, f"{write} for what differs from the defaults")
        _require_simple(yaml.parse(text, yaml.SafeLoader), name)
        value = yaml.safe_load(text)
    except OSError as error:
        raise ForgeError(f"{name}: {error.strerror}", fix) from error
    except (yaml.YAMLError, ValueError) as error:  # also what is no UTF-8, no date, no number
        raise ForgeError(f"{name} is not YAML: {error}", write) from error
    if not isinstance(value, dict | None):
        raise ForgeError(f"{name} holds a {type(value).__name__}", write)
    return value or {}


def _exists(file: Path) -> bool:
    try:
        return file.exists()
    except OSError:  # a name that is too long; a link to itself
        return False


def _require_simple(events: Any, name: str) -> None:
    """Refuse aliases of aliases and lists in lists before anything is built of them."""
    depth = aliases = 0
    for event in events:
        kind = type(event).__name__
        depth += kind in ("SequenceStartEvent", "MappingStartEvent")
        depth -= kind in ("SequenceEndEvent", "MappingEndEvent")
        aliases += kind == "AliasEvent"
        if depth > DEEPEST or aliases > MOST_ALIASES:
            what = "aliases (*name)" if aliases > MOST_ALIASES else "lists in lists"
            raise ForgeError(f"{name} has too many {what}", "write every value out, as one line")
