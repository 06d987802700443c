"""The flags about conversations, and what TRL, axolotl and LitGPT call them."""

from __future__ import annotations

import pytest

from p2p_llm_forge.config import PrepareConfig, TrainConfig, parse
from p2p_llm_forge.errors import ForgeError

NEEDED = ["--dataset-path", "talks.jsonl", "--output-dir", "out"]


def asked(words: str) -> PrepareConfig:
    return parse(PrepareConfig, [*NEEDED, *words.split()], "prepare_data.py")


@pytest.mark.parametrize(
    ("typed", "ours"),
    [
        ("--chat_template_path t.jinja", "--chat-template t.jinja"),
        ("--assistant_only_loss", "--train-on assistant"),
        ("--assistant_only_loss false", "--train-on all"),
        ("--completion_only_loss true", "--train-on assistant"),
        ("--mask_prompt", "--train-on assistant"),
        ("--train_on_inputs", "--train-on all"),
        ("--train_on_inputs=false", "--train-on assistant"),
        ("--roles_to_train assistant", "--train-on assistant"),
        ("--packing", ""),
        ("--sample_packing true --packing_strategy bfd", ""),
        ("--padding_free false", ""),
        ("--excess_length_strategy drop", "--long-conversations skip"),
        ("--excess_length_strategy truncate", "--long-conversations cut"),
        ("--excess_length_strategy raise", "--long-conversations error"),
        ("--max_length 512", "--sequence-length 512"),
        ("--sequence_len 512", "--sequence-length 512"),
        ("--dataset_text_field body", "--text-column body"),
        ("--dataset_num_proc 3", "--num-workers 3"),
        ("--dataset_train_split all", "--dataset-split all"),
    ],
)
def test_a_name_of_another_program_asks_for_the_same(typed, ours):
    assert asked(typed) == asked(ours)


@pytest.mark.parametrize(
    ("typed", "says"),
    [
        ("--packing false", "leave it out: blocks are filled with whole conversations"),
        ("--packing_strategy wrapped", "leave it out"),
        ("--truncation_mode keep_end", "use --long-conversations cut, skip or error"),
        ("--roles_to_train all", "use --train-on assistant, or --train-on all"),
        ("--train-on user", "assistant"),
        ("--long-conversations drop", "skip"),
    ],
)
def test_what_is_not_done_is_answered(typed, says):
    with pytest.raises(ForgeError) as error:
        asked(typed)
    assert says in error.value.problems[0].fix


def test_train_answers_what_is_decided_when_conversations_are_prepared():
    needed = ["--dataset-path", "data", "--output-dir", "run"]
    with pytest.raises(ForgeError) as error:
        parse(TrainConfig, [*needed, "--assistant_only_loss", "true"], "train.py")
    (problem,) = error.value.problems
    assert problem.found == "train.py has no --assistant_only_loss"
    assert problem.fix.startswith("prepare it first: python prepare_data.py --dataset-path TEXT")
    assert "--train-on assistant" in problem.fix
    same = parse(TrainConfig, [*needed, "--packing", "--max_length", "64"], "train.py")
    assert same == parse(TrainConfig, [*needed, "--sequence-length", "64"], "train.py")


def test_an_empty_template_is_refused():
    with pytest.raises(ForgeError, match="--chat-template is empty"):
        asked("--chat-template=")


def test_nothing_asks_for_conversations_but_their_flags():
    assert not asked("--sequence-length 64 --deduplicate exact").asks_for_conversations
    assert not asked("--long-conversations skip").asks_for_conversations
    for words in ("--train-on all", "--train-on assistant", "--chat-template t"):
        assert asked(words).asks_for_conversations
