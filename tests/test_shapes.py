"""A JSON value of another shape is named by the part that differs."""

from __future__ import annotations

import pytest

from p2p_llm_forge.shapes import is_count, is_number, is_path_inside, require_shape

SHAPE = {"a": is_count, "b": (None, str), "c": [{"d": is_number}], "e": {str: (int, None)}}
SHAPE |= {"f": (None, [is_path_inside])}
GOOD = {"a": 0, "b": None, "c": [{"d": 0.5}, {"d": 3}], "e": {"x": 1, "y": None}, "more": []}
GOOD |= {"f": ["a", "b"]}


def test_a_good_value_has_its_shape():
    for good in (GOOD, {**GOOD, "b": "word", "c": [], "e": {}}):
        assert require_shape(good, SHAPE) is None
    assert require_shape([1], object) is None


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"a": -1}, "'a' is -1"),
        ({"a": True}, "'a' is True"),
        ({"a": 2**63}, "'a' is 9223372036854775808"),
        ({"a": 1.0}, "'a' is 1.0"),
        ({"b": 5}, "'b' is 5"),
        ({"c": {}}, "'c' is {}"),
        ({"c": [{"d": 1}, {}]}, "'d' is None"),
        ({"c": [{"d": 1e999}]}, "'d' is inf"),
        ({"c": [5]}, r"'c'\[0\] is 5"),
        ({"e": None}, "'e' is None"),
        ({"f": [*"abcdefghijklmnopqrstuvwxyz", "../x"]}, r"'f'\[26\] is '../x'"),
        ({"f": "a"}, "'f' is 'a'"),
        ({"a": "x" * 99}, f"'a' is '{'x' * 59}[.]{{3}}$"),
        ({"e": {"\x1b": "x"}}, r"'\\x1b' is 'x'"),
    ],
)
def test_what_differs_is_named(changes, named):
    with pytest.raises(ValueError, match=named):
        require_shape({**GOOD, **changes}, SHAPE)


@pytest.mark.parametrize("value", [None, [], 5, "word"])
def test_another_kind_of_value_is_named(value):
    with pytest.raises(ValueError, match="it is"):
        require_shape(value, SHAPE)


def test_a_path_stays_inside():
    assert all(map(is_path_inside, ["a", "a/b.txt", "..a", "ü"]))
    outside = ["", ".", "..", "/a", "a/../b", "../a", "a//b", "a/", "a\\b", "a\0", None, 5]
    assert not any(map(is_path_inside, outside))
