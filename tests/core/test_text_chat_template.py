"""Chat templates: transformers' text on real shapes of template, and a bound on what a hostile one can do."""

from __future__ import annotations

import time
from datetime import datetime
from typing import Any

import pytest

from pellucid.errors import InvalidRequestError, TokenizerError
from pellucid.text.chat_template import MAX_TEMPLATE_CHARACTERS, compile_template, render_chat

USER = [{"role": "user", "content": "hi"}]
CHAT = [
    {"role": "system", "content": "Be <brief> & 'kind'."},
    {"role": "user", "content": "  What's up?\n"},
    {"role": "assistant", "content": "Größe 你好 😀"},
    {"role": "user", "content": "bye"},
]
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "weather",
            "description": "It's <b>weather</b> & more",
            "parameters": {"type": "object", "properties": {"city": {"type": "string", "enum": ["Köln"]}}},
        },
    }
]
CALLS = [
    *CHAT,
    {
        "role": "assistant",
        "content": "",
        "tool_calls": [{"type": "function", "function": {"name": "weather", "arguments": {"city": "Köln", "n": 1}}}],
    },
    {"role": "tool", "name": "weather", "content": '{"t": 20}'},
]

CHATML = """{%- for message in messages %}
    {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{%- endif %}"""
HEADERS = """{{ bos_token }}{% for m in messages %}
{% set content = '<|start|>' ~ m['role'] ~ '<|end|>\\n\\n' ~ m['content'] | trim ~ '<|eot|>' %}
    {% if loop.index0 == 0 and not loop.last %}{{ content | upper }}{% else %}{{ content }}{% endif %}
{% endfor %}"""
TURNS = """{% if messages[0]['role'] == 'system' %}{% set loop_messages = messages[1:] %}
{% set system = messages[0].content %}{% else %}{% set loop_messages = messages %}{% endif %}
{% for message in loop_messages -%}
{%- if (message['role'] == 'user') and system is defined and loop.first %}{{ system ~ '\\n\\n' }}{% endif -%}
{{ '<start_of_turn>' + ('model' if message['role'] == 'assistant' else message['role']) }}
{{ message['content'] | trim }}<end_of_turn>
{% endfor %}"""
TOOL_USE = """{%- set ns = namespace(multi=true, last=messages|length - 1) -%}
{%- if tools %}{{- '# Tools\\n' }}{% for tool in tools %}{{- '\\n' }}{{- tool | tojson }}{% endfor %}
{{- tools | tojson(indent=2) }}{% endif %}
{%- for message in messages[::-1] %}{%- set index = (messages|length - 1) - loop.index0 %}
    {%- if ns.multi and message.role == "user" and not(message.content.startswith('<x>')) %}
        {%- set ns.multi = false %}{%- set ns.last = index %}
    {%- endif %}
{%- endfor %}
{%- for message in messages %}
    {%- if message.tool_calls %}
        {%- for call in message.tool_calls %}
            {%- if call.function %}{%- set call = call.function %}{%- endif %}
            {{- '<tool_call>' ~ call.name }}
            {%- for name, value in call.arguments | items %}{{ name }}={{ value }};{% endfor %}
            {{- call.arguments | tojson if call.arguments is mapping else call.arguments }}
        {%- endfor %}
    {%- elif message.role not in ['user', 'assistant', 'system'] %}{% continue %}
    {%- else %}{% generation %}{{ message.content.split('</think>')[-1].lstrip('\\n') }}{% endgeneration %}
    {%- endif %}
    {%- if loop.index > 40 %}{% break %}{% endif %}
{%- endfor %}
{{- ns.last }}{{ ['a', 'b'] | join(', ') }}{{ dict(a=1).a }}
{{- messages | map(attribute='role') | list | unique | list }}
{%- if enable_thinking is defined and enable_thinking is false %}{{ '<think></think>' }}{% endif %}
{%- macro note(text, n=2) %}[{{ text | indent(n) }}]{% endmacro %}
{{- note('x\\ny') }}{{ '%s-%d' % ('a', 3) }}{{ 'ab'[::-1] }}
{{- messages | selectattr('role', 'equalto', 'user') | list | length }}{{ documents is none }}{{ none }}{{ 1.5 }}"""


@pytest.mark.parametrize("source", [CHATML, HEADERS, TURNS, TOOL_USE], ids=["chatml", "headers", "turns", "tools"])
@pytest.mark.parametrize("messages", [USER, CHAT, CALLS], ids=["user", "chat", "calls"])
@pytest.mark.parametrize("prompt", [True, False])
def test_given_a_template_when_rendered_then_the_text_equals_transformers(
    source: str, messages: list[dict[str, Any]], prompt: bool
) -> None:
    utilities = pytest.importorskip("transformers.utils.chat_template_utils")
    variables = {"bos_token": "<s>", "enable_thinking": False}
    expected, _ = utilities.render_jinja_template(
        [messages], tools=TOOLS, chat_template=source, add_generation_prompt=prompt, **variables
    )
    assert render_chat(source, messages, variables, tools=TOOLS, add_generation_prompt=prompt) == expected[0]


def test_given_a_clock_when_strftime_now_is_used_then_it_tells_the_given_time() -> None:
    text = render_chat("{{ strftime_now('%d %b %Y') }}", USER, clock=lambda: datetime(2024, 7, 26))
    assert text == "26 Jul 2024"


def test_given_text_parts_when_the_template_wants_text_then_they_are_joined() -> None:
    parts = [{"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}, "c"]}]
    assert render_chat("{{ messages[0].content }}", parts) == "a\nb\nc"
    reads = "{% for part in messages[0].content if messages[0].content is not string %}<{{ part.text }}>{% endfor %}"
    assert render_chat(reads, parts) == "<a><b><c>"


def test_given_a_call_without_content_when_rendered_then_content_is_empty_unless_the_template_asks() -> None:
    call = [{"role": "assistant", "content": None, "tool_calls": [{"name": "f"}]}]
    assert render_chat("{{ 'x' + messages[0].content }}", call) == "x"
    assert render_chat("{{ messages[0].content is none }}", call) == "True"


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ("hello", "must be a list"),
        ({"role": "user", "content": "x"}, "must be a list"),
        (None, "must be a list"),
        ([], "empty"),
        ([*USER, "x"], r"messages\[1\] is a str"),
        ([*USER, {"content": "x"}], r"messages\[1\]\.role"),
        ([*USER, {"role": 3, "content": "x"}], r"messages\[1\]\.role is 3"),
        ([*USER, {"role": "user"}], r"messages\[1\] has no content"),
        ([{"role": "user", "content": 5}], r"messages\[0\]\.content is a int"),
        (
            [{"role": "user", "content": [{"type": "image_url", "image_url": "x"}]}],
            r"content\[0\] has type 'image_url'",
        ),
        ([{"role": "user", "content": [{"type": "text"}]}], r"content\[0\]\.text"),
        ([{"role": "user", "content": [7]}], r"content\[0\] is a int"),
        ([{"role": "user", "content": "x", "extra": object()}], r"messages\[0\]\.extra is a object"),
    ],
)
def test_given_malformed_messages_when_rendered_then_the_error_names_the_index(messages: Any, message: str) -> None:
    with pytest.raises(InvalidRequestError, match=message) as caught:
        render_chat(CHATML, messages)
    assert caught.value.param == "messages"


def test_given_deeply_nested_values_when_rendered_then_invalid_request() -> None:
    value: Any = "x"
    for _ in range(500):
        value = [value]
    with pytest.raises(InvalidRequestError, match="deeper"):
        render_chat("", [{"role": "user", "content": "x", "deep": value}])


def test_given_a_template_that_refuses_when_rendered_then_invalid_request_carries_its_words() -> None:
    with pytest.raises(InvalidRequestError, match="roles must alternate"):
        render_chat("{{ raise_exception('roles must alternate') }}", USER)


HOSTILE = {
    "long loop": "{% for i in range(10**9) %}{% endfor %}",
    "nested loops": "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
    "nested loops over one range": "{% set r = range(99999) %}{% for i in r %}{% for j in r %}{% endfor %}{% endfor %}",
    "loops that write": "{% for i in range(99999) %}{% for j in range(99999) %}x{% endfor %}{% endfor %}",
    "loop over a long search": "{% set s = 'a' * 4000000 %}{% for i in range(99999) %}"
    "{% if 'b' in s %}{% endif %}{% endfor %}",
    "repeated string": "{{ 'a' * 10**10 }}",
    "repeated list": "{{ [0] * 10**10 }}",
    "power": "{{ 10 ** (10 ** 10) }}",
    "growing number": "{% set n = namespace(v=3) %}{% for i in range(99999) %}{% set n.v = n.v * n.v %}{% endfor %}",
    "center": "{{ 'x' | center(10**10) }}",
    "ljust": "{{ 'x'.ljust(10**10) }}",
    "expandtabs": "{{ '\t'.expandtabs(10**10) }}",
    "indent": "{{ ('a\\n' * 1000) | indent(100000) }}",
    "percent": "{{ '%10000000000d' % 1 }}",
    "percent star": "{{ '%*d' % (10**10, 1) }}",
    "format filter": "{{ '%10000000000d' | format(1) }}",
    "format": "{{ '{:10000000000}'.format(1) }}",
    "nested format": "{{ '{:{}}'.format(1, 10**10) }}",
    "format map": "{{ '{a:10000000000}'.format_map({'a': 1}) }}",
    "strftime": "{{ strftime_now('%10000000000d') }}",
    "json indent": "{{ range(99999) | list | tojson(indent=100000) }}",
    "replace": "{{ ('b' * 1000000).replace('', 'c' * 1000000) }}",
    "join": "{{ ('a' * 1000000).join(['b'] * 4000) }}",
    "join filter": "{{ range(99999) | map('string') | join('x' * 100000) }}",
    "doubling by tilde": "{% set n = namespace(s='aa') %}{% for i in range(60) %}{% set n.s = n.s ~ n.s %}{% endfor %}",
    "doubling by plus": "{% set n = namespace(s='aa') %}{% for i in range(60) %}{% set n.s = n.s + n.s %}{% endfor %}",
    "doubling by list": "{% set n = namespace(s=['a']) %}{% for i in range(60) %}"
    "{% set n.s = [n.s, n.s] %}{% endfor %}{{ n.s }}",
    "doubling by dict": "{% set n = namespace(s={}) %}{% for i in range(60) %}"
    "{% set n.s = dict(a=n.s, b=n.s) %}{% endfor %}",
    "doubling by block": "{% set n = namespace(s='aa') %}{% for i in range(60) %}"
    "{% set x %}{{ n.s }}{{ n.s }}{% endset %}{% set n.s = x %}{% endfor %}",
    "recursive macro": "{% macro f(x) %}{{ f(x) }}{% endmacro %}{{ f(1) }}",
    "branching macro": "{% macro f(x) %}{% if x %}{{ f(x - 1) }}{{ f(x - 1) }}{% endif %}{% endmacro %}{{ f(60) }}",
    "recursive loop": "{% for x in messages recursive %}{{ loop(messages) }}{% endfor %}",
    "class": "{{ ''.__class__.__mro__ }}",
    "globals": "{{ raise_exception.__globals__['json'] }}",
    "namespace attribute": "{% set n = namespace(__class__=1) %}",
    "mutation": "{{ messages.append(1) }}",
    "include": "{% include 'x' %}",
    "import": "{% import 'x' as y %}",
    "undefined": "{{ nothing.at.all }}",
    "type error": "{{ 1 + 'a' }}",
    "syntax": "{% if %}",
    "deep nesting": "{{ " + "[" * 3000 + "]" * 3000 + " }}",
    "too long": "x" * (MAX_TEMPLATE_CHARACTERS + 1),
}


@pytest.mark.parametrize("source", HOSTILE.values(), ids=HOSTILE.keys())
def test_given_a_hostile_template_when_rendered_then_tokenizer_error_within_two_seconds(source: str) -> None:
    start = time.perf_counter()
    with pytest.raises(TokenizerError):
        render_chat(source, USER)
    assert time.perf_counter() - start < 2 * 3  # two seconds on a core of its own


def test_given_a_long_conversation_when_rendered_then_it_is_within_the_bounds() -> None:
    messages = CHAT * 500
    for source in (CHATML, HEADERS, TURNS):
        assert len(render_chat(source, messages)) > 80_000


def test_given_the_same_template_when_rendered_again_then_it_is_not_compiled_again() -> None:
    assert compile_template(CHATML) is compile_template(CHATML)


def test_given_messages_when_rendered_then_they_are_not_changed() -> None:
    messages = [{"role": "user", "content": [{"type": "text", "text": "a"}]}]
    render_chat("{{ messages[0].content }}", messages)
    assert messages == [{"role": "user", "content": [{"type": "text", "text": "a"}]}]
