"""What a JSON value must look like before anybody counts on it."""

from __future__ import annotations

from typing import Any

LONGEST_SHOWN = 60  # characters


def require_shape(value: Any, shape: Any, name: str = "it") -> None:
    """Raise ValueError, naming the part, unless a JSON value is what a reader counts on.

    shape: a type, or a claim about the value; a tuple of shapes, one of which fits; a list of the
    shape of its items; a dict of shapes by key, of which a missing one counts as null and `str`
    stands for all. More keys are allowed.
    """
    if isinstance(shape, list):
        require_shape(value, list, name)
        for number, one in enumerate(value):
            require_shape(one, shape[0], f"{name}[{number}]")
    elif isinstance(shape, dict):
        require_shape(value, dict, name)
        for wanted, of_key in shape.items():
            for key in value if wanted is str else [wanted]:
                require_shape(value.get(key), of_key, _shown(key))
    else:
        shapes = shape if isinstance(shape, tuple) else (shape,)
        if any(_fits(value, one) for one in shapes):
            return
        for one in shapes:
            if isinstance(one, list) and isinstance(value, list):
                require_shape(value, one, name)  # raises, and names the item
        raise ValueError(f"{name} is {_shown(value)}")


def _shown(value: Any) -> str:
    text = ascii(value)
    return text if len(text) <= LONGEST_SHOWN else f"{text[:LONGEST_SHOWN]}..."


def _fits(value: Any, shape: Any) -> bool:
    if isinstance(shape, dict | list):
        try:
            require_shape(value, shape)
        except ValueError:
            return False
        return True
    if shape is None:
        return value is None
    if not isinstance(shape, type):
        return bool(shape(value))
    return isinstance(value, shape) and (shape is object or not isinstance(value, bool))


def is_count(value: Any) -> bool:
    """Whether a JSON value is a whole number that is not negative, and that fits a counter."""
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**63


def is_positive(value: Any) -> bool:
    """Whether a JSON value is a whole number from 1 on, as `is_count` means it."""
    return is_count(value) and value > 0


def is_number(value: Any) -> bool:
    """Whether a JSON value is a finite number."""
    is_one = isinstance(value, int | float) and not isinstance(value, bool)
    return is_one and -1e300 < value < 1e300


def is_path_inside(value: Any) -> bool:
    """Whether a JSON value names a file in a folder or below it, as a manifest does."""
    if not isinstance(value, str) or set(value) & set("\\\0"):
        return False
    return not {"", ".", ".."} & set(value.split("/"))


def is_flag(value: Any) -> bool:
    """Whether a JSON value is true or false."""
    return isinstance(value, bool)
