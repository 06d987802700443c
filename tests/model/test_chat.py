"""Conversations by chat templates, whose texts are written down here."""

from __future__ import annotations

import pytest

from p2p_llm_forge.errors import ForgeError
from p2p_llm_forge.model.chat import ends_of_answers, tokens_of_conversation
from tests.using.models import byte_tokenizer

CHATML = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
BY_EOS = (
    "{% for message in messages %}{{ message.role }}: {{ message.content }}"
    "{% if message.role == 'assistant' %} {{ eos_token }}{% endif %}\n{% endfor %}"
)
TALK = [{"role": "user", "content": "Who bakes?"}]


def tokenizer_with(template, *control):
    tokenizer = byte_tokenizer(chat_template=template)
    tokenizer.add_special_tokens({"additional_special_tokens": [*control]})
    return tokenizer


def test_the_assistant_is_to_go_on():
    tokenizer = tokenizer_with(CHATML, "<|im_start|>", "<|im_end|>")
    text = "<|im_start|>user\nWho bakes?<|im_end|>\n<|im_start|>assistant\n"
    tokens = tokens_of_conversation(tokenizer, TALK, "m")
    assert tokens == tokenizer.encode(text, add_special_tokens=False)
    assert tokens[0] == tokenizer.convert_tokens_to_ids("<|im_start|>")


def test_an_answer_ends_where_the_template_ends_it():
    """ChatML's mark is not what ends this tokenizer's documents."""
    tokenizer = tokenizer_with(CHATML, "<|im_start|>", "<|im_end|>")
    eos, end = tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert eos != end and ends_of_answers(tokenizer, [eos]) == [eos, end]
    assert ends_of_answers(tokenizer, [eos, end]) == [eos, end]
    by_eos = tokenizer_with(BY_EOS)
    assert ends_of_answers(by_eos, [by_eos.eos_token_id]) == [by_eos.eos_token_id]
    assert ends_of_answers(by_eos, []) == [by_eos.eos_token_id]


@pytest.mark.parametrize(
    "template",
    [
        CHATML,  # whose marks are no control tokens here, but letters
        "{% for message in messages %}{{ message.role }}{% endfor %}",  # without what was said
        "{{ raise_exception('no') }}",
        "{% for message in messages %}{{ message.content }}{% endfor %}",  # nothing after it
    ],
)
def test_text_ends_no_answer(template):
    assert ends_of_answers(tokenizer_with(template), [7]) == [7]


def test_a_template_that_fails_is_named():
    with pytest.raises(ForgeError, match="the chat template of m fails: no such role"):
        tokens_of_conversation(tokenizer_with("{{ raise_exception('no such role') }}"), TALK, "m")
