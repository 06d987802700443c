"""Options of prepare_data.py."""

from __future__ import annotations

from pathlib import Path

import pytest

from p2p_llm_forge.config import PrepareConfig

GIVEN = {"dataset_path": ["text.txt"], "output_dir": "out"}


@pytest.mark.parametrize(
    ("asked", "found"),
    [
        ({"dataset_path": []}, "no text given"),
        ({"output_dir": ""}, "no place for the result"),
        ({"sequence_length": 1}, "--sequence-length is 1"),
        ({"vocab_size": 256}, "--vocab-size is 256"),
        ({"validation_fraction": 1.0}, "--validation-fraction is 1.0"),
        ({"num_workers": -1}, "--num-workers is -1"),
        ({"document_separator": ""}, "--document-separator is empty"),
        ({"document_separator": "\\"}, "--document-separator '\\\\'"),
        ({"min_document_tokens": 0}, "--min-document-tokens is 0"),
        ({"min_document_tokens": 9, "max_document_tokens": 8}, "leaves out every document"),
        ({"verify": True}, "--verify checks a prepared dataset"),
        ({"dataset_path": [3], "seed": "x"}, "--seed is 'x'"),
    ],
)
def test_what_cannot_be_is_refused_with_a_fix(asked, found):
    (problem,) = PrepareConfig(**{**GIVEN, **asked}).problems().found
    assert found in problem.found and problem.fix


def test_a_description_needs_neither_text_nor_output():
    assert not PrepareConfig(describe="folder", verify=True).problems().found


def test_a_notebook_may_give_one_path_for_a_list():
    config = PrepareConfig(dataset_path=Path("a.txt"), validation_path="b.txt", output_dir="out")
    assert (config.dataset_path, config.validation_path) == (["a.txt"], ["b.txt"])


def test_escapes_in_the_separator_are_resolved_beyond_latin_1():
    assert PrepareConfig(document_separator="\\n—\\t").separator() == "\n—\t"
