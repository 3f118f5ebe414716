"""Requests of people who mean no good, or do not know what they send. Every row gets an answer that says what is wrong (field and
limit), or a normal one; behind it the server answers, and no block is held."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from utils.hostile_rows import OK, Row, check_row
from utils.http_server import RunningServer, running_server

MAX_MODEL_LEN = 512
VOCABULARY = 300
CHAT, COMPLETIONS, TOKENIZE, DETOKENIZE = "/v1/chat/completions", "/v1/completions", "/tokenize", "/detokenize"
_USER = [{"role": "user", "content": "hi"}]


@pytest.fixture(scope="module")
def server(tiny_model: Any) -> Iterator[RunningServer]:
    with running_server(tiny_model, served_model_name=("tiny",), max_body_bytes=1 << 20) as running:
        yield running


def _completion(status: int, *words: str, **fields: Any) -> Row:
    return Row(COMPLETIONS, {"prompt": "hi", "max_tokens": 2, **fields}, status, words)


def _chat(status: int, *words: str, **fields: Any) -> Row:
    return Row(CHAT, {"messages": _USER, "max_tokens": 2, **fields}, status, words)


def _raw(status: int, body: bytes, *words: str, path: str = COMPLETIONS) -> Row:
    return Row(path, body, status, words)


def _number(text: str, field: str) -> bytes:
    return b'{"prompt":"hi","max_tokens":2,"%s":%s}' % (field.encode(), text.encode())


PROMPTS: dict[str, Row] = {
    "empty text": _completion(400, "prompt", "empty", prompt=""),
    "empty list": _completion(400, "prompt", "empty", prompt=[]),
    "empty list within": _completion(400, "prompt", prompt=[[]]),
    "empty text within": _completion(400, "prompt", "empty", prompt=["hi", ""]),
    "missing": Row(COMPLETIONS, {"max_tokens": 2}, 400, ("prompt", "required")),
    "null": _completion(400, "prompt", prompt=None),
    "number": _completion(400, "prompt", "5", prompt=5),
    "object": _completion(400, "prompt", prompt={"text": "hi"}),
    "true": _completion(400, "prompt", prompt=True),
    "id -1": _completion(400, "prompt[1]", "-1", prompt=[5, -1]),
    "id beyond the vocabulary": _completion(400, "300", prompt=[VOCABULARY]),
    "last id": _completion(OK, prompt=[VOCABULARY - 1]),
    "id 2^31": _completion(400, "prompt[0]", prompt=[2**31]),
    "id 2^63": _completion(400, "prompt[0]", prompt=[2**63]),
    "id 10^300": _completion(400, "prompt[0]", prompt=[10**300]),
    "id float": _completion(400, "prompt[0]", "1.5", prompt=[1.5]),
    "id whole float": _completion(400, "prompt[0]", "1.0", prompt=[1.0]),
    "id true": _completion(400, "prompt[0]", "True", prompt=[True]),
    "id null": _completion(400, "prompt[0]", "None", prompt=[None]),
    "id text": _completion(400, "prompt[1]", prompt=[5, "hi"]),
    "ids and texts": _completion(400, "prompt", prompt=["hi", [5]]),
    "lists three deep": _completion(400, "prompt[0][0]", prompt=[[[5]]]),
    "too many prompts": _completion(400, "257", "256", prompt=["hi"] * 257),
    "lone high surrogate": _raw(400, b'{"prompt":"a\\ud800b"}', "prompt", "U+D800"),
    "lone low surrogate": _raw(400, b'{"prompt":["x","\\uDC00"]}', "prompt[1]", "U+DC00"),
    "surrogates in order": _raw(OK, b'{"prompt":"\\ud83d\\ude00","max_tokens":2}'),
    "surrogates out of order": _raw(400, b'{"prompt":"\\ude00\\ud83d"}', "surrogate"),
    "surrogate in a key": _raw(400, b'{"prompt":"a","\\ud800":1}', "surrogate"),
    "NUL": _completion(OK, prompt="a\0b"),
    "NUL alone": _completion(OK, prompt="\0"),
    "control characters": _completion(OK, prompt="\x01\x02\x1b[2J\x7f"),
    "right to left": _completion(OK, prompt="\u202eevil\u202c"),
    "combining": _completion(OK, prompt="a" + "\u0301" * 100),
    "special tokens as text": _completion(OK, prompt="</s><s><pad>"),
    "as long as can be": _completion(OK, prompt=[5] * (MAX_MODEL_LEN - 1)),
    "one too long": _completion(400, "512", "max_model_len", prompt=[5] * MAX_MODEL_LEN),
    "two too long": _completion(400, "513", "max_model_len", prompt=[5] * (MAX_MODEL_LEN + 1)),
    "much too long": _completion(400, "max_model_len", prompt="ab " * 100_000),
    "10 MB": _completion(413, "max_body_bytes", prompt="x" * 10_000_000),
}
NUMBERS: dict[str, Row] = {
    **{
        f"{field} {text}": _raw(400, _number(text, field), f"{field} is ")
        for field in ("temperature", "top_p", "min_p", "presence_penalty", "frequency_penalty", "repetition_penalty")
        for text in ("NaN", "Infinity", "-Infinity", "1e300", '"1"', "true", "[]")
    },
    **{
        f"{field} {text}": _raw(400, _number(text, field), f"{field} is ")
        for field in ("n", "top_k", "max_tokens", "min_tokens", "logprobs", "seed")
        for text in ("1.5", '"1"', "true", "1e300", str(2**64))
    },
    "temperature -0": _raw(OK, _number("-0.0", "temperature")),
    "temperature 1e-300": _raw(OK, _number("1e-300", "temperature")),
    "temperature 1e999": _raw(400, _number("1e999", "temperature"), "temperature"),
    "temperature with 500 digits": _raw(400, _number("1" * 500, "temperature"), "digits"),
    "seed 2^63": _raw(OK, _number(str(2**63), "seed")),
    "seed -2^63": _raw(OK, _number(str(-(2**63)), "seed")),
    "max_tokens 0": _completion(400, "max_tokens", max_tokens=0),
    "max_tokens -1": _completion(400, "max_tokens", max_tokens=-1),
    "max_tokens 2^31": _completion(400, "max_tokens", max_tokens=2**31),
    "max_tokens beyond the model": _completion(OK, prompt=[5] * 505, max_tokens=100_000),
    "min_tokens > max_tokens": _completion(400, "min_tokens", "max_tokens", min_tokens=3),
    "n 0": _completion(400, "n is 0", n=0),
    "n times prompts": _completion(400, "n", "1,024", prompt=["hi"] * 200, n=100),
    "n 10^6": _completion(400, "n is 1000000", "128", n=10**6),
    "best_of": _completion(400, "best_of", best_of=2),
    "logprobs 10^6": _completion(400, "logprobs", "100", logprobs=10**6),
    "prompt_logprobs -1": _completion(400, "prompt_logprobs", prompt_logprobs=-1),
    "top_logprobs without logprobs": _chat(400, "top_logprobs", top_logprobs=3),
    "top_logprobs 1000": _chat(400, "top_logprobs", "100", logprobs=True, top_logprobs=1000),
    "logprobs as a number in chat": _chat(400, "logprobs", logprobs=1),
    "priority 2^40": _completion(400, "priority", priority=2**40),
    "priority float": _completion(400, "priority", priority=0.5),
}
LISTS: dict[str, Row] = {
    "stop empty text": _completion(400, "stop", "empty", stop=""),
    "stop empty text within": _completion(400, "stop[1]", stop=["a", ""]),
    "stop 10^4 texts": _completion(400, "stop", "10,000", "32", stop=["x"] * 10_000),
    "stop too long": _completion(400, "stop[0]", "1,024", stop=["x" * 2000]),
    "stop a number": _completion(400, "stop", stop=5),
    "stop numbers": _completion(400, "stop[0]", stop=[5]),
    "stop null": _completion(OK, stop=None),
    "stop no texts": _completion(OK, stop=[]),
    "stop surrogate": _raw(400, b'{"prompt":"a","stop":"\\udfff"}', "stop", "U+DFFF"),
    "stop_token_ids beyond": _completion(400, "stop_token_ids", stop_token_ids=[VOCABULARY]),
    "stop_token_ids -1": _completion(400, "stop_token_ids[0]", stop_token_ids=[-1]),
    "logit_bias 10^6 entries": _completion(413, "max_body_bytes", logit_bias={str(i): 1 for i in range(10**6)}),
    "logit_bias 10^4 entries": _completion(400, "logit_bias", "1,024", logit_bias={str(i): 1 for i in range(10**4)}),
    "logit_bias key": _completion(400, "logit_bias", logit_bias={"a": 1}),
    "logit_bias key beyond": _completion(400, "logit_bias", logit_bias={str(VOCABULARY): 1}),
    "logit_bias key -1": _completion(400, "logit_bias", logit_bias={"-1": 1}),
    "logit_bias value": _completion(400, "logit_bias", "100", logit_bias={"5": 101}),
    "logit_bias NaN": _raw(400, b'{"prompt":"a","logit_bias":{"5":NaN}}', "logit_bias"),
    "logit_bias a list": _completion(400, "logit_bias", logit_bias=[1]),
    "all banned by bias": _completion(OK, logit_bias={str(i): -100 for i in range(VOCABULARY)}),
    "all banned by words": _completion(
        400, "bad_words", bad_words=[chr(33 + i % 90) * (1 + i // 90) for i in range(300)]
    ),
    "the only token banned": _completion(OK, allowed_token_ids=[40], bad_words=["E"]),
    "allowed none begins": _completion(
        400, "allowed_token_ids", "structured_outputs", allowed_token_ids=[40], structured_outputs={"choice": ["yes"]}
    ),
    "allowed none": _completion(400, "allowed_token_ids", allowed_token_ids=[]),
    "allowed beyond": _completion(400, "allowed_token_ids", allowed_token_ids=[VOCABULARY]),
    "bad_words empty": _completion(400, "bad_words[0]", bad_words=[""]),
    "metadata of 17": _chat(400, "metadata", metadata={str(i): "x" for i in range(17)}),
    "metadata numbers": _chat(400, "metadata", metadata={"a": 1}),
}
FIELDS: dict[str, Row] = {
    "unknown": _completion(400, "nonsense", nonsense=1),
    "unknown in chat": _chat(400, "nonsense", nonsense=None),
    "unknown within": _chat(400, "messages[0].nonsense", messages=[{**_USER[0], "nonsense": 1}]),
    "unknown in stream_options": _completion(
        400, "stream_options.nonsense", stream=True, stream_options={"nonsense": 1}
    ),
    "stream_options without stream": _completion(400, "stream_options", stream_options={"include_usage": True}),
    "stream as text": _completion(400, "stream", stream="true"),
    "echo as number": _completion(400, "echo", echo=1),
    "suffix": _completion(400, "suffix", suffix="end"),
    "model other": _completion(404, "other", model="other"),
    "model number": _completion(400, "model", model=5),
    "model long": _completion(400, "model", model="x" * 10_000),
    "request_id with spaces": _completion(400, "request_id", request_id="a b"),
    "request_id empty": _completion(400, "request_id", request_id=""),
    "cache_salt empty": _completion(400, "cache_salt", cache_salt=""),
    "store": _chat(400, "store", store=True),
    "audio": _chat(400, "audio", audio={"voice": "x"}),
    "modalities": _chat(400, "modalities", modalities=["audio"]),
    "prediction": _chat(400, "prediction", prediction={"type": "content", "content": "x"}),
    "web search": _chat(400, "web_search_options", web_search_options={}),
    "functions": _chat(400, "functions", functions=[{"name": "f"}]),
    "prompt_logprobs streamed": _completion(400, "prompt_logprobs", stream=True, prompt_logprobs=1),
    "both template switches": _chat(
        400, "continue_final_message", continue_final_message=True, add_generation_prompt=True
    ),
    "template variable taken": _chat(400, "chat_template_kwargs", chat_template_kwargs={"messages": []}),
}


def _schema(status: int, schema: Any, *words: str, **fields: Any) -> Row:
    return _chat(
        status,
        *words,
        response_format={"type": "json_schema", "json_schema": {"name": "x", "schema": schema}},
        **fields,
    )


def _structure(status: int, kind: str, value: Any, *words: str) -> Row:
    return _completion(status, "structured_outputs", *words, structured_outputs={kind: value})


_CHAIN = {f"d{i}": {"$ref": f"#/$defs/d{i + 1}"} for i in range(1500)}
_DOUBLING = {f"d{i}": {"allOf": [{"$ref": f"#/$defs/d{i + 1}"}] * 2} for i in range(40)}
STRUCTURES: dict[str, Row] = {
    "format unknown": _chat(400, "response_format", response_format={"type": "yaml"}),
    "format text": _chat(OK, response_format={"type": "text"}),
    "format null": _chat(OK, response_format=None),
    "format a text": _chat(400, "response_format", response_format="json"),
    "format structural": _chat(400, "response_format", response_format={"type": "structural_tag", "format": {}}),
    "schema missing": _chat(400, "response_format.json_schema", response_format={"type": "json_schema"}),
    "schema missing within": _chat(
        400, "json_schema.schema", response_format={"type": "json_schema", "json_schema": {"name": "x"}}
    ),
    "schema beside json_object": _chat(
        400, "json_schema", response_format={"type": "json_object", "json_schema": {"schema": {}}}
    ),
    "schema null": _schema(400, None, "json_schema.schema"),
    "schema of nothing": _schema(400, {"enum": []}, "response_format.json_schema.schema"),
    "schema that contradicts itself": _schema(400, {"type": "integer", "minimum": 5, "maximum": 3}, "minimum"),
    "schema of an unknown type": _schema(400, {"type": "nonsense"}, "nonsense"),
    "schema with not": _schema(400, {"not": {}}, "not"),
    "schema with a bad pattern": _schema(400, {"type": "string", "pattern": "("}, "response_format"),
    "schema with look-ahead": _schema(400, {"type": "string", "pattern": "(?=a)b"}, "response_format"),
    "schema that is itself": _schema(400, {"$ref": "#/$defs/a", "$defs": {"a": {"$ref": "#/$defs/a"}}}, "satisfies"),
    "schema elsewhere": _schema(400, {"$ref": "http://169.254.169.254/latest"}, "response_format"),
    "schema in a file": _schema(400, {"$ref": "file:///etc/passwd"}, "response_format"),
    "schema with a dangling reference": _schema(400, {"$ref": "#/$defs/none"}, "response_format"),
    "schema of 1,500 references": _schema(400, {"$ref": "#/$defs/d0", "$defs": {**_CHAIN, "d1500": {}}}, "stack"),
    "schema of 1,500 references streamed": _schema(
        400, {"$ref": "#/$defs/d0", "$defs": {**_CHAIN, "d1500": {}}}, "response_format", stream=True
    ),
    "schema that doubles": _schema(
        OK, {"$ref": "#/$defs/d0", "$defs": {**_DOUBLING, "d40": {"type": "string", "maxLength": 9}}}
    ),
    "schema recursive": _schema(OK, {"type": "array", "items": {"$ref": "#"}}),
    "schema 10^9 long": _schema(OK, {"type": "string", "minLength": 10**9}),
    "schema with our own key": _schema(400, {"type": "object", "x-guidance": {}}, "x-guidance"),
    "schema of 300 KB": _schema(400, {"enum": ["x" * 300_000]}, "262,144"),
    "schema of 60k nestings as text": _structure(400, "json", '{"a":' * 60_000 + "1" + "}" * 60_000, "json"),
    "schema of 200 nestings as text": _structure(400, "json", '{"not":' * 200 + "{}" + "}" * 200, "100"),
    "schema a number": _structure(400, "json", 5, "json"),
    "schema no JSON": _structure(400, "json", "{", "json"),
    "none of five": _completion(400, "structured_outputs", "nothing", structured_outputs={}),
    "two of five": _completion(400, "regex", "choice", structured_outputs={"regex": "a", "choice": ["a"]}),
    "unknown key": _completion(400, "structural_tag", structured_outputs={"structural_tag": "{}"}),
    "not an object": _completion(400, "structured_outputs", structured_outputs="[a-z]"),
    "two fields": _completion(400, "guided_regex", guided_regex="a", response_format={"type": "json_object"}),
    "object false": _completion(400, "structured_outputs", structured_outputs={"json_object": False}),
    "regex open": _completion(400, "guided_regex", guided_regex="("),
    "regex empty": _completion(400, "guided_regex", "empty", guided_regex=""),
    "regex with look-behind": _structure(400, "regex", "(?<=a)b", "regex"),
    "regex with back-reference": _structure(400, "regex", r"(a)\1", "regex"),
    "regex of 60k nestings": _completion(400, "guided_regex", "8,192", guided_regex="(" * 60_000 + ")" * 60_000),
    "regex of 4k nestings": _completion(400, "guided_regex", guided_regex="(" * 4000 + ")" * 4000),
    "regex exponential": _completion(OK, guided_regex="(a|b)*a(a|b){300}", max_tokens=40),
    "regex of powers": _structure(OK, "regex", "((((a{1,99}){1,99}){1,99}){1,99}){1,99}"),
    "regex a list": _completion(400, "guided_regex", guided_regex=["a"]),
    "regex NUL": _completion(OK, guided_regex="\\x00"),
    "choice none": _completion(400, "guided_choice", guided_choice=[]),
    "choice of empty texts": _completion(400, "guided_choice", guided_choice=["", ""]),
    "choice of 10^4": _completion(400, "guided_choice", "1,024", guided_choice=["x"] * 10_000),
    "choice a text": _completion(400, "guided_choice", guided_choice="yes"),
    "grammar no grammar": _completion(400, "guided_grammar", guided_grammar="hello"),
    "grammar with an unknown rule": _structure(400, "grammar", "start: other", "other"),
    "grammar of nothing": _structure(400, "grammar", "start: T\nT: /a/ & /b/", "no text satisfies it"),
    "grammar left-recursive": _structure(OK, "grammar", 'start: start "a" | "b"'),
    "grammar without an end": _structure(OK, "grammar", 'start: "a" start'),
    "grammar of 60k nestings": _structure(
        400, "grammar", "start: " + "(" * 60_000 + '"a"' + ")" * 60_000, "60,000", "100"
    ),
    "grammar too costly": _structure(
        400, "grammar", "start: T\nT: /(.*a.{30}){5}/ & ~/(.*b.{40}){5}/ & /(.*c.{50}){5}/", "grammar"
    ),
    "grammar that reads a file": _structure(400, "grammar", "%import .secret (X)\nstart: X", "grammar"),
    "surrogate": _raw(400, b'{"prompt":"a","guided_regex":"\\ud800"}', "guided_regex", "U+D800"),
    "whitespace for a regex": _completion(
        400, "whitespace_pattern", structured_outputs={"regex": "a", "whitespace_pattern": " "}
    ),
}


def _tools(status: int, *words: str, tools: Any, **fields: Any) -> Row:
    return _chat(status, *words, tools=tools, **fields)


def _tool(parameters: Any = None, name: Any = "f") -> dict[str, Any]:
    return {"type": "function", "function": {"name": name, "parameters": parameters}}


TOOLS: dict[str, Row] = {
    "none": _tools(OK, tools=[]),
    "null": _tools(OK, tools=None, tool_choice="auto"),
    "an object": _tools(400, "tools", tools=_tool()),
    "of another type": _tools(400, "tools[0].type", tools=[{"type": "web_search"}]),
    "no function": _tools(400, "tools[0].function", tools=[{"type": "function"}]),
    "name with spaces": _tools(400, "tools[0].function.name", tools=[_tool(name="a b")]),
    "name empty": _tools(400, "tools[0].function.name", tools=[_tool(name="")]),
    "name long": _tools(400, "tools[0].function.name", tools=[_tool(name="x" * 65)]),
    "name twice": _tools(400, "'f' twice", tools=[_tool(), _tool()]),
    "129 tools": _tools(400, "tools", "128", tools=[_tool(name=f"f{i}") for i in range(129)]),
    "parameters a list": _tools(400, "tools[0].function.parameters", tools=[_tool([1])]),
    "unknown key": _tools(400, "tools[0].nonsense", tools=[{**_tool(), "nonsense": 1}]),
    "bad schema not forced": _tools(OK, tools=[_tool({"type": "nonsense"})]),
    "bad schema forced": _tools(
        400, "tools", "nonsense", tools=[_tool({"properties": {"a": {"type": "nonsense"}}})], tool_choice="required"
    ),
    "dangling reference forced": _tools(
        400, "tools", tools=[_tool({"properties": {"a": {"$ref": "#/$defs/none"}}})], tool_choice="required"
    ),
    "choice without tools": _chat(400, "tool_choice", tool_choice="required"),
    "choice of no tools": _tools(400, "tool_choice", tools=[], tool_choice="required"),
    "choice unknown": _tools(400, "tool_choice", tools=[_tool()], tool_choice="always"),
    "choice of another": _tools(
        400, "tool_choice", "'g'", tools=[_tool()], tool_choice={"type": "function", "function": {"name": "g"}}
    ),
    "choice of a set": _tools(400, "tool_choice", tools=[_tool()], tool_choice={"type": "allowed_tools"}),
    "forced beside a structure": _tools(
        400, "tool_choice", tools=[_tool()], tool_choice="required", guided_json={"type": "object"}
    ),
    "beside a regex": _tools(400, "tools", "regex", tools=[_tool()], guided_regex="a"),
    "parallel a text": _tools(400, "parallel_tool_calls", tools=[_tool()], parallel_tool_calls="no"),
    "call with broken arguments": _chat(
        OK,
        messages=[
            *_USER,
            {"role": "assistant", "tool_calls": [{"id": "1", "function": {"name": "f", "arguments": "{"}}]},
            {"role": "tool", "tool_call_id": "1", "content": "x"},
        ],
    ),
    "call without a function": _chat(
        400, "messages[0].tool_calls[0]", messages=[{"role": "assistant", "tool_calls": [{"id": "1"}]}]
    ),
    "effort unknown": _chat(400, "reasoning_effort", reasoning_effort="extreme"),
    "effort of a model that has none": _chat(400, "reasoning_effort", "low", reasoning_effort="low"),
    "effort none": _chat(OK, reasoning_effort="none"),
}
MESSAGES: dict[str, Row] = {
    "none": _chat(400, "messages", messages=[]),
    "missing": Row(CHAT, {}, 400, ("messages", "required")),
    "null": _chat(400, "messages", messages=None),
    "text": _chat(400, "messages", messages="hi"),
    "numbers": _chat(400, "messages[0]", messages=[5]),
    "no role": _chat(400, "messages[0].role", messages=[{"content": "hi"}]),
    "other role": _chat(400, "messages[0].role", messages=[{"role": "root", "content": "hi"}]),
    "no content": _chat(400, "messages[0]", messages=[{"role": "user"}]),
    "content number": _chat(400, "messages[0].content", messages=[{"role": "user", "content": 5}]),
    "image": _chat(
        400,
        "messages[0].content",
        messages=[{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "http://a/b.png"}}]}],
    ),
    "part without text": _chat(400, "text", messages=[{"role": "user", "content": [{"type": "text"}]}]),
    "too many": _chat(400, "messages", "4096", messages=_USER * 4097),
    "surrogate": _raw(400, b'{"messages":[{"role":"user","content":"\\ud8ff"}]}', "messages[0].content", path=CHAT),
    "template code": _chat(
        OK, messages=[{"role": "user", "content": "{{ 7*7 }}{% for x in range(9**9) %}{% endfor %}"}]
    ),
}
BODIES: dict[str, Row] = {
    "empty": _raw(400, b"", "empty"),
    "blank": _raw(400, b"  \n", "empty"),
    "not JSON": _raw(400, b"{prompt: hi}", "JSON"),
    "cut off": _raw(400, b'{"prompt":"hi"', "JSON"),
    "behind the end": _raw(400, b'{"prompt":"hi"} x', "JSON"),
    "array": _raw(400, b"[]", "array"),
    "null": _raw(400, b"null", "null"),
    "number": _raw(400, b"5", "number"),
    "bad UTF-8": _raw(400, b'{"prompt":"\xff\xfe"}', "UTF-8"),
    "overlong UTF-8": _raw(400, b'{"prompt":"\xc0\x80"}', "UTF-8"),
    "UTF-8 surrogate": _raw(400, b'{"prompt":"\xed\xa0\x80"}', "UTF-8"),
    "UTF-16": _raw(400, '{"prompt":"hi"}'.encode("utf-16"), "UTF-8"),
    "BOM": _raw(400, b'\xef\xbb\xbf{"prompt":"hi"}', "JSON"),
    "60k arrays": _raw(400, b'{"prompt":' + b"[" * 60_000 + b"]" * 60_000 + b"}", "nested", "64"),
    "60k objects": _raw(400, b'{"a":' * 60_000 + b"1" + b"}" * 60_000, "nested", "64"),
    "60k open": _raw(400, b"[" * 60_000, "JSON"),
    "brackets in a text": _raw(OK, json.dumps({"prompt": '[[[{{{"\\' * 20, "max_tokens": 2}).encode()),
    "crossed brackets": _raw(400, b'{"prompt":[1,2}]', "JSON"),
    "quotes and backslashes": _raw(400, b'{"prompt":"' + b'\\"' * 400_000, "JSON"),
    "key twice": _raw(OK, b'{"prompt":"hi","max_tokens":2,"max_tokens":3}'),
    "tokenize both": Row(TOKENIZE, {"prompt": "a", "messages": _USER}, 400, ("prompt",)),
    "tokenize none": Row(TOKENIZE, {}, 400, ("prompt",)),
    "tokenize text": Row(TOKENIZE, {"prompt": ""}, OK),
    "detokenize -1": Row(DETOKENIZE, {"tokens": [-1]}, 400, ("tokens[0]",)),
    "detokenize beyond": Row(DETOKENIZE, {"tokens": [2**31 - 1]}, 400, ("vocabulary",)),
    "detokenize text": Row(DETOKENIZE, {"tokens": "abc"}, 400, ("tokens",)),
    "detokenize none": Row(DETOKENIZE, {"tokens": []}, OK),
}
ROWS = {
    f"{group}: {name}": row
    for group, rows in {
        "prompt": PROMPTS,
        "number": NUMBERS,
        "list": LISTS,
        "field": FIELDS,
        "structure": STRUCTURES,
        "tool": TOOLS,
        "message": MESSAGES,
        "body": BODIES,
    }.items()
    for name, row in rows.items()
}


@pytest.fixture(scope="module")
def client(server: RunningServer) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=server.url, timeout=300) as made:
        yield made


@pytest.mark.parametrize("name", ROWS)
def test_given_hostile_body_when_sent_then_it_is_told_why_and_nothing_is_held(
    server: RunningServer, client: httpx.Client, name: str
) -> None:
    check_row(client, ROWS[name], ("message", "type", "param", "code"))
    assert client.get("/health").status_code == OK
    server.wait_until_idle()


def test_given_the_table_when_counted_then_it_has_at_least_120_rows() -> None:
    assert len(ROWS) >= 120
