"""Chat templates: ours are what they say, a model's own are rendered as transformers renders them."""

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from formats import FORMATS, OURS, Message, conversations, rewritten, spans
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from jinja2 import Environment

from llm_recipes.chat.shapes import BadRow, Conversation
from llm_recipes.chat.template import NO_SPAN, REFUSED, Template, open_template
from llm_recipes.errors import UserError

some = settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
OUR_NAMES = sorted(path.stem for path in OURS.glob("*.jinja"))
TWO = [
    {"role": "system", "content": "短く。"},
    {"role": "user", "content": "1+1は?"},
    {"role": "assistant", "content": "2"},
    {"role": "user", "content": "もう1"},
    {"role": "assistant", "content": "3"},
]
WRITTEN = {
    "chatml": "<|im_start|>system\n短く。<|im_end|>\n<|im_start|>user\n1+1は?<|im_end|>\n<|im_start|>assistant\n2</s>\n"
    "<|im_start|>user\nもう1<|im_end|>\n<|im_start|>assistant\n3</s>\n",
    "llm_jp": "<s>短く。\n\n### 指示:\n1+1は?\n\n### 応答:\n2</s>\n\n### 指示:\nもう1\n\n### 応答:\n3</s>",
    "alpaca": "<s>短く。\n\n### Instruction:\n1+1は?\n\n### Response:\n2</s>\n\n### Instruction:\nもう1\n\n"
    "### Response:\n3</s>",
    "llama2": "<s>[INST] <<SYS>>\n短く。\n<</SYS>>\n\n1+1は? [/INST] 2 </s><s>[INST] もう1 [/INST] 3 </s>",
    "plain": "1+1は?2</s>もう13</s>",
}


@pytest.fixture(scope="module")
def opened(tokenizer_of: Callable[[str], Any]) -> Callable[[str], Template]:
    return lambda name: open_template(tokenizer_of("bytes"), name, {})


def test_every_template_of_ours_stands_here() -> None:
    assert set(WRITTEN) == set(OUR_NAMES) == {name.removeprefix("ours: ") for name in FORMATS if "ours: " in name}


@pytest.mark.parametrize("name", OUR_NAMES)
def test_ours_write_what_they_say(opened: Callable[[str], Template], name: str) -> None:
    messages = TWO[1:] if name == "plain" else TWO
    assert opened(name).render(messages) == WRITTEN[name]


@pytest.mark.parametrize("name", OUR_NAMES)
@some
@given(data=st.data())
def test_ours_go_on_where_the_generation_prompt_ends(
    opened: Callable[[str], Template], name: str, data: st.DataObject
) -> None:
    template = opened(name)
    messages = data.draw(conversations(system=name != "plain"))
    whole = template.render(messages)
    for at, each in enumerate(messages):
        if each["role"] == "assistant":
            asked = template.render(messages[:at], generation_prompt=True)
            assert whole.startswith(asked)
            assert whole[len(asked) :].lstrip(" ").startswith(each["content"].lstrip(" "))
        assert whole.startswith(template.render(messages[: at + 1]))


@pytest.mark.parametrize("name", OUR_NAMES)
def test_ours_begin_by_saying_what_they_are_and_need_no_setting_of_white_space(name: str) -> None:
    text = (OURS / f"{name}.jinja").read_text(encoding="utf-8")
    assert text.startswith("{#- ")
    messages = TWO[1:] if name == "plain" else TWO
    rendered = {
        Environment(trim_blocks=trim, lstrip_blocks=lstrip, keep_trailing_newline=keep)
        .from_string(text)
        .render(messages=messages, bos_token="<s>", eos_token="</s>")
        for trim, lstrip, keep in itertools.product([False, True], repeat=3)
    }
    assert rendered == {WRITTEN[name]}


@pytest.mark.parametrize("name", OUR_NAMES)
def test_a_tokenizer_without_bos_gets_none(name: str, tokenizer_of: Callable[[str], Any]) -> None:
    template = open_template(tokenizer_of("bytes"), name, {})
    without = Template(template.text, {"eos_token": "</s>"}, template.controls)
    messages = TWO[1:] if name == "plain" else TWO
    assert without.render(messages) == WRITTEN[name].replace("<s>", "")


@pytest.mark.parametrize(
    ("name", "messages"),
    [
        ("plain", TWO),
        ("llama2", [TWO[1], TWO[3], TWO[4]]),
        ("llama2", [TWO[1], TWO[2], TWO[0], TWO[3], TWO[4]]),
        ("llm_jp", [TWO[1], TWO[2], TWO[0], TWO[3], TWO[4]]),
        ("alpaca", [TWO[1], TWO[2], TWO[0], TWO[3], TWO[4]]),
        *((name, [*TWO[1:3], {"role": "tool", "content": "4"}, TWO[4]]) for name in OUR_NAMES),
    ],
)
def test_what_a_format_of_ours_has_no_place_for_is_refused(
    opened: Callable[[str], Template], name: str, messages: list[Message]
) -> None:
    with pytest.raises(BadRow, match="the chat template refuses it") as refused:
        opened(name).rendered(Conversation(messages))
    assert refused.value.reason == REFUSED


def test_a_model_s_own_refusal_is_told(opened: Callable[[str], Template]) -> None:
    with pytest.raises(BadRow, match="System role not supported"):
        opened(str(FORMATS["gemma"].place)).rendered(Conversation(TWO))


@pytest.mark.parametrize("name", FORMATS)
@some
@given(data=st.data())
def test_rendering_is_that_of_transformers_and_of_the_hand(
    tokenizer_of: Callable[[str], Any], name: str, data: st.DataObject
) -> None:
    chosen = FORMATS[name]
    tokenizer = tokenizer_of("bytes")
    messages = data.draw(conversations(chosen.system))
    template = open_template(tokenizer, str(chosen.place), {})
    text, answers = spans(chosen.write(messages, tokenizer.bos_token, tokenizer.eos_token))
    for asked in (False, True):
        expected = tokenizer.apply_chat_template(
            messages, chat_template=chosen.template, tokenize=False, add_generation_prompt=asked
        )
        assert template.render(messages, generation_prompt=asked) == expected
    assert template.render(messages) == text
    if not rewritten(chosen, messages):
        rendered = template.rendered(Conversation(messages))
        assert (rendered.text, rendered.answers) == (text, answers)


def test_arguments_reach_the_template(tokenizer_of: Callable[[str], Any]) -> None:
    place = str(FORMATS["qwen3"].place)
    messages = [{"role": "user", "content": "3+4は?"}, {"role": "assistant", "content": "7"}]
    for arguments, trained in (({}, "<think>\n\n</think>\n\n7<|im_end|>"), ({"enable_thinking": False}, "7<|im_end|>")):
        template = open_template(tokenizer_of("byte-level"), place, arguments)
        text, (span,) = (found := template.rendered(Conversation(messages))).text, found.answers
        assert text[slice(*span)] == trained


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("{% for m in messages %}{{ m.content }}{% endfor %}{% if add_generation_prompt %}A:{% endif %}", NO_SPAN),
        ("{% for m in messages if m.role == 'user' %}{{ m.content }}{% endfor %}", NO_SPAN),
        ("{% for m in messages %}{{ loop.revindex }}{{ m.content }}{% endfor %}", "rewrites"),
        ("{{ messages[9].content.strip() }}", REFUSED),
    ],
)
def test_a_template_in_which_the_answer_cannot_be_found_is_refused(
    tokenizer_of: Callable[[str], Any], tmp_path: Path, text: str, reason: str
) -> None:
    place = tmp_path / "own.jinja"
    place.write_text(text)
    template = open_template(tokenizer_of("bytes"), str(place), {})
    with pytest.raises(BadRow) as refused:
        template.rendered(Conversation(TWO[1:]))
    assert reason in refused.value.reason


def test_a_template_that_is_none_is_a_user_s_error(tokenizer_of: Callable[[str], Any], tmp_path: Path) -> None:
    tokenizer = tokenizer_of("bytes")
    (tmp_path / "broken.jinja").write_text("{% for m in messages %}\n{{ m.content ")
    (tmp_path / "bytes.jinja").write_bytes(b"\xff\xfe")
    for name, said in (
        (None, "the model's tokenizer has no chat template; name one"),
        ("chatm", "chatml"),
        (str(tmp_path / "broken.jinja"), "line 2"),
        (str(tmp_path / "bytes.jinja"), "not UTF-8"),
    ):
        with pytest.raises(UserError, match=said):
            open_template(tokenizer, name, {})


def test_marks_of_a_template_decide_what_trains(tokenizer_of: Callable[[str], Any], tmp_path: Path) -> None:
    place = tmp_path / "own.jinja"
    place.write_text(
        "{% for m in messages %}{% if m.role == 'assistant' %}A:{% generation %}{{ m.content }}{% endgeneration %};"
        "{% else %}Q:{{ m.content }};{% endif %}{% endfor %}{% if add_generation_prompt %}A:{% endif %}"
    )
    rendered = open_template(tokenizer_of("bytes"), str(place), {}).rendered(Conversation(TWO[1:]))
    assert [rendered.text[start:end] for start, end in rendered.answers] == ["2", "3"]  # and not the ";" after them
