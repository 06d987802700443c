"""Conversations as text: what transformers renders, and which of it the assistant says."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import trl
from transformers import PreTrainedTokenizerFast

from p2p_llm_forge.data.chat_template import PLAIN, ChatTemplate, NotRenderedError
from p2p_llm_forge.errors import ForgeError
from tests.data.talks import MARKED, UNMARKED, rows, talking_tokenizer

TALK = [
    {"role": "user", "content": "one?"}, {"role": "assistant", "content": "two üñî"},
    {"role": "user", "content": "three?"}, {"role": "assistant", "content": "four"},
]  # fmt: skip
OF_TRL = Path(trl.__file__).parent / "chat_templates"


def template_of(text: str, tmp_path: Path, tokenizer=None) -> ChatTemplate:
    path = tmp_path / "template.jinja"
    path.write_text(text, encoding="utf-8")
    return ChatTemplate.of(tokenizer or talking_tokenizer(None), str(path))


def spoken(text: str, spans: list[tuple[int, int]]) -> list[str]:
    return [text[start:end] for start, end in spans]


def test_what_the_assistant_says_is_found_without_marks_as_with_them(tmp_path):
    marked, unmarked = template_of(MARKED, tmp_path), template_of(UNMARKED, tmp_path)
    assert marked.says_where and not unmarked.says_where
    for row in rows(50, seed=6):
        found = marked.said(row["messages"])
        assert found == unmarked.said(row["messages"])
        answers = [one["content"] for one in row["messages"] if one["role"] == "assistant"]
        assert spoken(*found) == [f"{answer}<|im_end|>\n" for answer in answers]


# What TRL's own copies of them, which mark it, say about templates that do not.
KNOWN = ["qwen2_5", "qwen3", "llama3", "phi3", "gemma", "cohere2"]


@pytest.mark.parametrize("name", KNOWN)
def test_the_templates_of_common_models_give_what_trl_marks_in_them(name, tmp_path):
    stock, training = OF_TRL / f"{name}.jinja", OF_TRL / f"{name}_training.jinja"
    if not (stock.exists() and training.exists()):
        pytest.skip(f"this version of TRL has no {name}")
    tokenizer = talking_tokenizer(None)
    ends = ["<|end|>", "<|eot_id|>", "<end_of_turn>", "<|END_OF_TURN_TOKEN|>"]
    tokenizer.add_special_tokens(
        {"additional_special_tokens": ends, "bos_token": "<s>"}, replace_extra_special_tokens=False
    )
    ours = ChatTemplate.of(tokenizer, str(stock))
    text, spans = ours.said(TALK)
    reference = tokenizer.apply_chat_template(
        TALK[-2:], chat_template=training.read_text(), return_dict=True,
        return_assistant_tokens_mask=True,
    )  # fmt: skip
    marks = zip(reference["input_ids"], reference["assistant_masks"], strict=True)
    last = tokenizer.decode([token for token, mark in marks if mark])
    assert len(spans) == 2 and "two üñî" in spoken(text, spans)[0]
    # TRL's copies differ by white space, and by thoughts that stock templates leave out.
    assert spoken(text, spans)[1].split()[-1] == last.split()[-1]
    assert text[: spans[0][0]].endswith(ours.rendered(TALK[:1], is_prompt=True)[0][-5:])


def test_a_turn_that_reads_otherwise_later_is_found_or_refused(tmp_path):
    thinks = "{% if loop.last %}{{ '<think></think>' }}{% endif %}"
    turn = "{% if m['role'] == 'assistant' %}"
    template = template_of(UNMARKED.replace(turn, turn + thinks), tmp_path)
    text, spans = template.said(TALK)
    assert spoken(text, spans) == ["two üñî<|im_end|>\n", "<think></think>four<|im_end|>\n"]
    counted = "{% if m['role'] == 'assistant' %}{{ messages | length }}"
    with pytest.raises(NotRenderedError, match="writes turn 2 otherwise when others follow") as no:
        template_of(UNMARKED.replace(turn, counted), tmp_path).said(TALK)
    assert "{% generation %}" in no.value.fix and "--train-on all" in no.value.fix


def test_a_prompt_that_no_turn_begins_with_is_refused(tmp_path):
    asks = "{{ '<|im_start|>assistant\n' }}"
    thinking = template_of(UNMARKED.replace(asks, asks + "<think>"), tmp_path)
    with pytest.raises(NotRenderedError, match="to ask for turn 2 is not what stands before") as no:
        thinking.said(TALK[:2])
    assert "{% generation %}" in no.value.fix


def test_whether_a_model_learns_to_stop_is_known(tmp_path):
    assert template_of(UNMARKED, tmp_path).ends_answers
    assert template_of(MARKED, tmp_path).ends_answers
    assert template_of(PLAIN, tmp_path).ends_answers
    end = "<|im_end|>\n' }}"
    assert not template_of(UNMARKED.replace(end, "\n' }}"), tmp_path).ends_answers
    late = MARKED.replace(f"{end}{{% endgeneration %}}", f"' }}}}{{% endgeneration %}}{{{{ '{end}")
    assert late != MARKED and not template_of(late, tmp_path).ends_answers


def test_a_tokenizer_without_a_template_gets_a_plain_one():
    tokenizer = talking_tokenizer(None)
    template = ChatTemplate.of(tokenizer, None)
    assert template.text == PLAIN and "plain" in template.origin
    text, spans = template.said([{"role": "system", "content": " be brief "}, *TALK])
    end = tokenizer.eos_token
    assert text == (
        f"### System:\nbe brief\n\n### User:\none?\n\n### Assistant:\ntwo üñî{end}\n\n"
        f"### User:\nthree?\n\n### Assistant:\nfour{end}\n\n"
    )
    assert spoken(text, spans) == [f"two üñî{end}\n\n", f"four{end}\n\n"]
    assert template.rendered(TALK[:1], is_prompt=True)[0].endswith("\n\n### Assistant:\n")


def test_a_file_goes_before_the_tokenizers_own_template(tmp_path):
    tokenizer: PreTrainedTokenizerFast = talking_tokenizer(MARKED)
    assert ChatTemplate.of(tokenizer, None).origin == "the tokenizer's chat template"
    assert template_of(UNMARKED, tmp_path, tokenizer).text == UNMARKED


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("{% for m in messages %}", "fails: TemplateSyntaxError"),
        ("{{ messages[0].content + 1 }}", "fails: TypeError"),
        ("{{ raise_exception('no users') }}", "fails: TemplateError: no users"),
        ("{{ messages[7].content.text }}", "fails: UndefinedError"),
        ("{# nothing #}", "makes no text of a conversation"),
        (" \n", "is empty"),
    ],
)
def test_a_template_that_fails_is_refused_at_once(text, found, tmp_path):
    with pytest.raises(ForgeError) as error:
        template_of(text, tmp_path)
    (problem,) = error.value.problems
    assert problem.found.startswith(f"--chat-template {tmp_path / 'template.jinja'} ")
    assert found in problem.found


def test_a_file_that_is_no_template_is_refused(tmp_path):
    (tmp_path / "latin").write_bytes(b"\xff\xfe")
    for name, reason in {"none": "No such file", "latin": "not UTF-8", ".": "directory"}.items():
        with pytest.raises(ForgeError, match=reason):
            ChatTemplate.of(talking_tokenizer(), str(tmp_path / name))


def test_the_tokenizers_own_template_may_fail_too():
    with pytest.raises(ForgeError) as error:
        ChatTemplate.of(talking_tokenizer("{{ nothing.at.all }}"), None)
    (problem,) = error.value.problems
    assert problem.found.startswith("the tokenizer's chat template fails")
    assert problem.fix == "give another by --chat-template FILE"


def test_a_template_that_writes_the_date_is_known(tmp_path):
    dated = "{{ strftime_now('%Y') }}" + UNMARKED
    assert template_of(dated, tmp_path).depends_on_the_day
    assert not template_of(UNMARKED, tmp_path).depends_on_the_day


def test_random_talks_are_rendered_as_transformers_renders_them(tmp_path):
    tokenizer, draw = talking_tokenizer(), random.Random(8)
    for text in (MARKED, UNMARKED, PLAIN):
        template = template_of(text, tmp_path, tokenizer)
        for row in draw.sample(rows(40, seed=9), 10):
            expected = tokenizer.apply_chat_template(
                row["messages"], chat_template=text, tokenize=False
            )
            assert template.said(row["messages"])[0] == expected


def test_a_row_may_tell_the_template_more():
    tokenizer = talking_tokenizer("{{ tools | tojson }}{{ style }}" + MARKED)
    template, tools = ChatTemplate.of(tokenizer, None), [{"name": "f", "a": 1}]
    expected = tokenizer.apply_chat_template(TALK, tools=tools, style="short", tokenize=False)
    assert template.said(TALK, {"tools": tools, "style": "short"})[0] == expected


def test_of_several_templates_one_must_be_chosen(tmp_path):
    tokenizer = talking_tokenizer({"one": MARKED, "two": UNMARKED})
    with pytest.raises(ForgeError, match="several chat templates") as error:
        ChatTemplate.of(tokenizer, None)
    assert "--chat-template FILE" in error.value.problems[0].fix
    assert template_of(UNMARKED, tmp_path, tokenizer).text == UNMARKED
    tokenizer.chat_template = {"default": MARKED, "two": UNMARKED}
    assert ChatTemplate.of(tokenizer, None).text == MARKED
