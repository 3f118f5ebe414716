"""Requests of people who mean no good, or do not know what they send. Every row gets an answer that says what is wrong (field and
limit), or a normal one; behind it the server answers, and no block is held."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any, NamedTuple

import httpx
import pytest
from utils.http_server import RunningServer, running_server

MAX_MODEL_LEN = 512
VOCABULARY = 300
CHAT, COMPLETIONS, TOKENIZE, DETOKENIZE = "/v1/chat/completions", "/v1/completions", "/tokenize", "/detokenize"
_USER = [{"role": "user", "content": "hi"}]
_OK = 200


@pytest.fixture(scope="module")
def server(tiny_model: Any) -> Iterator[RunningServer]:
    with running_server(tiny_model, served_model_name=("tiny",), max_body_bytes=1 << 20) as running:
        yield running


class Row(NamedTuple):
    """A body and what it gets: the status, and words that its message has."""

    path: str
    body: Any  # bytes are sent as they are
    status: int
    words: tuple[str, ...] = ()


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
    "last id": _completion(_OK, prompt=[VOCABULARY - 1]),
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
    "surrogates in order": _raw(_OK, b'{"prompt":"\\ud83d\\ude00","max_tokens":2}'),
    "surrogates out of order": _raw(400, b'{"prompt":"\\ude00\\ud83d"}', "surrogate"),
    "surrogate in a key": _raw(400, b'{"prompt":"a","\\ud800":1}', "surrogate"),
    "NUL": _completion(_OK, prompt="a\0b"),
    "NUL alone": _completion(_OK, prompt="\0"),
    "control characters": _completion(_OK, prompt="\x01\x02\x1b[2J\x7f"),
    "right to left": _completion(_OK, prompt="\u202eevil\u202c"),
    "combining": _completion(_OK, prompt="a" + "\u0301" * 100),
    "special tokens as text": _completion(_OK, prompt="</s><s><pad>"),
    "as long as can be": _completion(_OK, prompt=[5] * (MAX_MODEL_LEN - 1)),
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
    "temperature -0": _raw(_OK, _number("-0.0", "temperature")),
    "temperature 1e-300": _raw(_OK, _number("1e-300", "temperature")),
    "temperature 1e999": _raw(400, _number("1e999", "temperature"), "temperature"),
    "temperature with 500 digits": _raw(400, _number("1" * 500, "temperature"), "digits"),
    "seed 2^63": _raw(_OK, _number(str(2**63), "seed")),
    "seed -2^63": _raw(_OK, _number(str(-(2**63)), "seed")),
    "max_tokens 0": _completion(400, "max_tokens", max_tokens=0),
    "max_tokens -1": _completion(400, "max_tokens", max_tokens=-1),
    "max_tokens 2^31": _completion(400, "max_tokens", max_tokens=2**31),
    "max_tokens beyond the model": _completion(_OK, prompt=[5] * 505, max_tokens=100_000),
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
    "stop null": _completion(_OK, stop=None),
    "stop no texts": _completion(_OK, stop=[]),
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
    "all banned by bias": _completion(_OK, logit_bias={str(i): -100 for i in range(VOCABULARY)}),
    "all banned by words": _completion(
        400, "bad_words", bad_words=[chr(33 + i % 90) * (1 + i // 90) for i in range(300)]
    ),
    "the only token banned": _completion(_OK, allowed_token_ids=[40], bad_words=["E"]),
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
        _OK, messages=[{"role": "user", "content": "{{ 7*7 }}{% for x in range(9**9) %}{% endfor %}"}]
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
    "brackets in a text": _raw(_OK, json.dumps({"prompt": '[[[{{{"\\' * 20, "max_tokens": 2}).encode()),
    "crossed brackets": _raw(400, b'{"prompt":[1,2}]', "JSON"),
    "quotes and backslashes": _raw(400, b'{"prompt":"' + b'\\"' * 400_000, "JSON"),
    "key twice": _raw(_OK, b'{"prompt":"hi","max_tokens":2,"max_tokens":3}'),
    "tokenize both": Row(TOKENIZE, {"prompt": "a", "messages": _USER}, 400, ("prompt",)),
    "tokenize none": Row(TOKENIZE, {}, 400, ("prompt",)),
    "tokenize text": Row(TOKENIZE, {"prompt": ""}, _OK),
    "detokenize -1": Row(DETOKENIZE, {"tokens": [-1]}, 400, ("tokens[0]",)),
    "detokenize beyond": Row(DETOKENIZE, {"tokens": [2**31 - 1]}, 400, ("vocabulary",)),
    "detokenize text": Row(DETOKENIZE, {"tokens": "abc"}, 400, ("tokens",)),
    "detokenize none": Row(DETOKENIZE, {"tokens": []}, _OK),
}
ROWS = {
    f"{group}: {name}": row
    for group, rows in {
        "prompt": PROMPTS,
        "number": NUMBERS,
        "list": LISTS,
        "field": FIELDS,
        "message": MESSAGES,
        "body": BODIES,
    }.items()
    for name, row in rows.items()
}


def _encoded(body: Any) -> bytes:
    return body if isinstance(body, bytes) else json.dumps(body).encode()


@pytest.fixture(scope="module")
def client(server: RunningServer) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=server.url, timeout=300) as made:
        yield made


@pytest.mark.parametrize("name", ROWS)
def test_given_hostile_body_when_sent_then_it_is_told_why_and_nothing_is_held(
    server: RunningServer, client: httpx.Client, name: str
) -> None:
    row = ROWS[name]
    answer = client.post(row.path, content=_encoded(row.body), headers={"content-type": "application/json"})

    assert answer.status_code == row.status, answer.text[:500]
    if row.status != _OK:
        error = answer.json()["error"]
        assert set(error) == {"message", "type", "param", "code"}
        assert len(error["message"]) <= 1000
        for word in row.words:
            assert word in error["message"] or word == error["param"], error
        for private in ("Traceback", "/opt/", "/usr/", "0x7f", "site-packages"):
            assert private not in answer.text
    assert client.get("/health").status_code == _OK
    server.wait_until_idle()


def test_given_the_table_when_counted_then_it_has_at_least_120_rows() -> None:
    assert len(ROWS) >= 120
