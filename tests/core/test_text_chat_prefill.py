"""An answer that is begun for the model: the prompt ends exactly where the template leaves the text, whatever the text is."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from datetime import datetime
from typing import Any, NamedTuple

import pytest

from pellucid.errors import InvalidRequestError
from pellucid.text.chat_prefill import left_open, text_behind
from pellucid.text.chat_template import render_chat

HI = [{"role": "user", "content": "hi"}]


class Shape(NamedTuple):
    """A template, what it writes before and behind the text of a second message, and what it makes of that text."""

    source: str
    before: str
    behind: str
    kept: Callable[[str], str]


def _as_it_is(text: str) -> str:
    return text


SHAPES = {
    "chatml": Shape(
        "{% for m in messages %}{{ '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>' + '\\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}",
        "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n",
        "<|im_end|>\n",
        _as_it_is,
    ),
    "llama3, trims": Shape(
        "{{ bos_token }}{% for m in messages %}{% set content = '<|start_header_id|>' + m.role + '<|end_header_id|>\\n\\n'"
        " + m['content'] | trim + '<|eot_id|>' %}{{ content }}{% endfor %}",
        "<s><|start_header_id|>user<|end_header_id|>\n\nhi<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n",
        "<|eot_id|>",
        str.strip,
    ),
    "mistral": Shape(
        "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}{{ '[INST] ' + m.content + ' [/INST]' }}"
        "{% else %}{{ ' ' + m.content | trim + eos_token }}{% endif %}{% endfor %}",
        "<s>[INST] hi [/INST] ",
        "</s>",
        str.strip,
    ),
    "mistral, keeps": Shape(
        "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]"
        "{% else %}{{ m.content }}{{ eos_token }}{% endif %}{% endfor %}",
        "<s>[INST] hi [/INST]",
        "</s>",
        _as_it_is,
    ),
    "gemma": Shape(
        "{% for m in messages %}{{ '<start_of_turn>' + ('model' if m.role == 'assistant' else m.role) + '\\n'"
        " + m['content'] | trim + '<end_of_turn>\\n' }}{% endfor %}",
        "<start_of_turn>user\nhi<end_of_turn>\n<start_of_turn>model\n",
        "<end_of_turn>\n",
        str.strip,
    ),
    "trims the right": Shape(
        "{% for m in messages %}{{ m.role }}: {{ m.content.rstrip() }}\n\n{% endfor %}",
        "user: hi\n\nassistant: ",
        "\n\n",
        str.rstrip,
    ),
    "trims the left": Shape(
        "{% for m in messages %}{{ m.role }}:{{ m.content.lstrip() }} |{% endfor %}",
        "user:hi |assistant:",
        " |",
        str.lstrip,
    ),
    "trims line ends": Shape(
        "{% for m in messages %}{{ m.content.rstrip('\\n') }}\n{% endfor %}",
        "hi\n",
        "\n",
        lambda text: text.rstrip("\n"),
    ),
    "nothing behind": Shape("{% for m in messages %}{{ m.content }}{% endfor %}", "hi", "", _as_it_is),
}
ALPHABET = "<|e \n"
SHORT = ["".join(text) for count in (0, 1, 2, 3) for text in itertools.product(ALPHABET, repeat=count)]
TEXTS = ["The answer is: ", "```json\n", "hi", "user", " hi ", "hi\n\n", "\u00a0", "{{ 7 * 7 }}", "1", "1" * 40, "é😀 "]
VARIABLES = {"bos_token": "<s>", "eos_token": "</s>"}


def _render(source: str, **variables: Any) -> Callable[[Any], str]:
    clock = datetime(2024, 7, 26)

    def render(messages: Any) -> str:
        return render_chat(
            source, messages, {**VARIABLES, **variables}, add_generation_prompt=False, clock=lambda: clock
        )

    return render


def _begun(text: Any, **more: Any) -> list[dict[str, Any]]:
    return [*HI, {"role": "assistant", "content": text, **more}]


@pytest.mark.parametrize("name", SHAPES)
def test_given_any_begun_text_when_left_open_then_the_prompt_ends_with_what_the_template_keeps(name: str) -> None:
    shape = SHAPES[name]
    tail = shape.before + shape.behind
    pieces = [tail[start:end] for start in range(len(tail)) for end in (start + 1, start + 4, len(tail))]
    prefixes = [shape.behind[:end] for end in range(len(shape.behind) + 1)]
    render = _render(shape.source)
    for text in dict.fromkeys([*SHORT, *TEXTS, *prefixes, *pieces]):
        found = left_open(render, _begun(text))
        assert (found.text, found.begun) == (shape.before + shape.kept(text), shape.kept(text)), repr(text)


@pytest.mark.parametrize("name", SHAPES)
def test_given_parts_when_left_open_then_it_is_as_their_text(name: str) -> None:
    shape, render = SHAPES[name], _render(SHAPES[name].source)
    for parts in (["<", "|"], ["The answer", "is: "], ["a\n", "\n"], ["x"], []):
        content = [{"type": "text", "text": part} for part in parts]
        assert left_open(render, _begun(content)).text == shape.before + shape.kept("\n".join(parts)), parts


READS_PARTS = (
    "{% for m in messages %}<{{ m.role }}>{% if m.content is string %}{{ m.content }}{% else %}"
    "{% for part in m.content %}{{ part.text }}{% endfor %}{% endif %}<end>{% endfor %}"
)


def test_given_template_that_reads_parts_when_left_open_then_the_last_part_is() -> None:
    content = [{"type": "text", "text": "<e"}, {"type": "text", "text": "<end> "}]
    found = left_open(_render(READS_PARTS), _begun(content))
    assert (found.text, found.begun) == ("<user>hi<end><assistant><e<end> ", "<e<end> ")


# Templates that look into the text, and what they make of an answer that was begun with some text.
LOOKS = {
    "thoughts are cut": (
        "{% for m in messages %}<{{ m.role }}>{{ m.content.split('</think>')[-1] }}<end>{% endfor %}",
        "<think>a</think>so ",
        "<user>hi<end><assistant>so ",
    ),
    "thoughts are moved": (
        "{% for m in messages %}<{{ m.role }}>{% set c = m.content %}{% if '</think>' in c %}"
        "{{ '<think>' + c.split('</think>')[0].split('<think>')[-1].strip('\\n') + '</think>\\n\\n' }}"
        "{% set c = c.split('</think>')[-1].lstrip('\\n') %}{% endif %}{{ c }}<end>{% endfor %}",
        "<think>\na\n</think>\nso",
        "<user>hi<end><assistant><think>a</think>\n\nso",
    ),
    "thoughts that are open": (
        "{% for m in messages %}<{{ m.role }}>{{ m.content.split('</think>')[-1] }}<end>{% endfor %}",
        "<think>\nso</thin",
        "<user>hi<end><assistant><think>\nso</thin",
    ),
    "JSON": (
        "{% for m in messages %}{{ m.content | tojson }};{% endfor %}",
        'say "x"\n',
        '"hi";"say \\"x\\"\\n',
    ),
    "upper": ("{% for m in messages %}{{ m.content | upper }}.{% endfor %}", "so ", "HI.SO "),
    "the last is written another way": (
        "{% for m in messages %}{{ '>' if loop.last else '<' }}{{ m.content }}{% if not loop.last %}|{% endif %}{% endfor %}",
        "so",
        "<hi|>so",
    ),
    "a prompt all the same": (
        "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}assistant:",
        "assistant:",
        "user: hi\nassistant: assistant:",
    ),
    "thoughts of its own": (
        "{% for m in messages %}<{{ m.role }}>{% if m.reasoning_content is defined %}<think>{{ m.reasoning_content }}</think>"
        "{% endif %}{{ m.content }}<end>{% endfor %}",
        "</think>",
        "<user>hi<end><assistant></think>",
    ),
}


@pytest.mark.parametrize("name", LOOKS)
def test_given_template_that_looks_into_the_text_when_left_open_then_the_prompt_is_a_beginning_of_its_own(
    name: str,
) -> None:
    source, text, expected = LOOKS[name]
    render = _render(source)
    found = left_open(render, _begun(text))
    assert found.text == expected
    assert render(_begun(text)).startswith(found.text)


def test_given_thoughts_beside_the_text_when_left_open_then_they_stay() -> None:
    source = LOOKS["thoughts of its own"][0]
    found = left_open(_render(source), _begun("so", reasoning_content="Hm"))
    assert (found.text, found.begun) == ("<user>hi<end><assistant><think>Hm</think>so", "so")


@pytest.mark.parametrize(
    ("source", "problem"),
    [
        ("{% for m in messages %}{% if m.role == 'user' %}{{ m.content }}{% endif %}{% endfor %}", "does not show"),
        ("{% for m in messages %}{{ m.content[:2] }}{% endfor %}", "does not show"),
        ("{% for m in messages %}{{ m.content }}{{ m.content }}{% endfor %}", "more than once"),
        ("{% for m in messages %}{{ m.content }}{% endfor %}{{ messages[-1].content }}", "more than once"),
        ("{% for m in messages %}{{ m.content | length }}{{ m.content }}{% endfor %}", "as it is given"),
        ("{% for m in messages %}{{ m.content.rstrip('o') }}.{% endfor %}", "as it is given"),
    ],
)
def test_given_template_that_does_not_write_the_text_when_left_open_then_it_is_refused(
    source: str, problem: str
) -> None:
    with pytest.raises(InvalidRequestError, match=problem) as caught:
        left_open(_render(source), _begun("so"))
    assert caught.value.param == "messages"


def test_given_calls_when_left_open_then_they_are_refused() -> None:
    call = {"type": "function", "function": {"name": "f", "arguments": {}}}
    for content in ("so", None):
        with pytest.raises(InvalidRequestError, match="tool_calls"):
            left_open(_render(SHAPES["chatml"].source), _begun(content, tool_calls=[call]))
    assert left_open(_render(SHAPES["chatml"].source), _begun("so", tool_calls=[])).begun == "so"


@pytest.mark.parametrize("name", SHAPES)
def test_given_template_when_asked_then_what_it_writes_behind_the_last_text_is_known(name: str) -> None:
    shape = SHAPES[name]
    for text in SHORT:
        assert text_behind(_render(shape.source), _begun(text)) == shape.behind
    assert text_behind(_render("{{ messages[0].content }}"), _begun("x")) is None
