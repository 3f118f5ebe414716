"""Random HTTP requests to a server of ours: the fields come from its OpenAPI, the values from everywhere.

Most requests begin with one that is plainly valid; fields of the schema are added, with values that fit the schema, that a request
may well have, or that are hostile; some bodies are then broken as JSON, or as HTTP.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field
from random import Random
from typing import Any
from urllib.parse import quote

from kit import values
from kit.calls import VALID
from kit.http_client import HOST, request_bytes

_TOOL = {
    "type": "function",
    "function": {"name": "f", "parameters": {"type": "object", "properties": {"a": {"type": "integer"}}}},
}
_FLAT_TOOL = {
    "type": "function",
    "name": "f",
    "parameters": {"type": "object", "properties": {"a": {"type": "string"}}},
}
_SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"], "additionalProperties": False}

# A request of each path that is plainly right.
BASES: dict[str, Any] = {
    "/v1/chat/completions": {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 4},
    "/v1/completions": {"prompt": "hello", "max_tokens": 4},
    "/v1/embeddings": {"input": "hello"},
    "/v1/responses": {"input": "hi", "max_output_tokens": 16},
    "/v1/messages": {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 4, "model": "tiny"},
    "/v1/messages/count_tokens": {"messages": [{"role": "user", "content": "hi"}], "model": "tiny"},
    "/tokenize": {"prompt": "hello"},
    "/detokenize": {"tokens": [100, 101]},
}
# What fields may well have, beside what `calls.VALID` says of those that Python has too.
_LIKELY: dict[str, tuple[Any, ...]] = {
    "stream": (True, True, False, None),
    "stream_options": ({"include_usage": True}, {"continuous_usage_stats": True}, {}),
    "logprobs": (True, False, 0, 2, 5),
    "top_logprobs": (0, 1, 5, 20),
    "echo": (True, False),
    "max_tokens": (1, 2, 5, 0, 120),
    "max_completion_tokens": (1, 3, 120),
    "max_output_tokens": (16, 20, 120),
    "model": ("tiny", "missing", ""),
    "tools": ([_TOOL], [_FLAT_TOOL], [], [{"name": "f", "input_schema": _SCHEMA}]),
    "parallel_tool_calls": (True, False),
    "truncation": ("auto", "disabled"),
    "tool_choice": (
        "auto",
        "none",
        "required",
        {"type": "auto"},
        {"type": "any"},
        {"type": "tool", "name": "f"},
        "required",
    ),
    "response_format": (
        {"type": "text"},
        {"type": "json_object"},
        {"type": "json_schema", "json_schema": {"name": "x", "schema": _SCHEMA, "strict": True}},
    ),
    "text": ({"format": {"type": "text"}}, {"format": {"type": "json_schema", "name": "x", "schema": _SCHEMA}}),
    "messages": (
        [{"role": "system", "content": "be brief"}, {"role": "user", "content": [{"type": "text", "text": "hi"}]}],
        [{"role": "user", "content": "a"}, {"role": "assistant", "content": "<"}],
        [{"role": "user", "content": "a"}, {"role": "assistant", "content": "end "}, {"role": "user", "content": "b"}],
    ),
    "continue_final_message": (True, False),
    "add_generation_prompt": (True, False),
    "prompt": ("a", ["a", "b c"], [5], [[5, 6], [7]], "", [], [[]], [320]),
    "input": (
        [{"role": role, "content": "word " * 20} for role in ("user", "assistant") * 8]
        + [{"role": "user", "content": "b"}],
        [
            {"role": "user", "content": "hi"},
            {"type": "function_call", "call_id": "c", "name": "f", "arguments": "{}"},
            {"type": "function_call_output", "call_id": "c", "output": "1"},
        ],
        "a",
        ["a", "b"],
        [5, 6],
        [[5]],
        [{"role": "user", "content": "hi"}],
        "",
    ),
    "thinking": ({"type": "enabled", "budget_tokens": 1024}, {"type": "disabled"}),
    "include": (["message.output_text.logprobs"], []),
    "system": ("be brief", [{"type": "text", "text": "be brief"}]),
    "stop": ("e", ["a", "the"], None),
    "stop_sequences": (["e"], []),
    "request_id": ("mine", "a" * 128, "a b", None),
    "previous_response_id": ("resp_unknown", None),
    "store": (True, False),
    "hidden_states_format": ("float", "base64"),
    "encoding_format": ("float", "base64"),
    "dimensions": (64, 1, 65, None),
    "return_token_ids": (True, False),
    "return_token_strs": (True, False),
    "chat_template_kwargs": ({}, {"enable_thinking": False}),
    "best_of": (1, 2, None),
    "n": (1, 2, 3),
    "tokens": ([], [1, 2], [319], [320], [10**9]),
    "logit_bias": ({"5": 1.0}, {"320": 1.0}, {"x": 1}, {}),
}
# Where a request would go on for long, only small numbers are likely.
_LENGTHS = ("max_tokens", "max_completion_tokens", "max_output_tokens")


# Fields that mean something together.
_TOGETHER: tuple[tuple[str, ...], ...] = (
    ("echo", "logprobs", "max_tokens", "prompt"),
    ("stream", "stream_options", "logprobs"),
    ("tools", "tool_choice", "stream", "max_tokens", "max_output_tokens"),
    ("tools", "tool_choice", "max_tokens", "max_output_tokens", "parallel_tool_calls"),
    ("input", "truncation", "store"),
    ("previous_response_id", "store", "stream"),
    ("echo", "messages", "add_generation_prompt", "stream"),
    ("include", "stream", "input"),
    ("logprobs", "top_logprobs"),
    ("return_hidden_states", "hidden_states_for_tokens", "hidden_states_layers", "hidden_states_format", "stream"),
    ("messages", "continue_final_message", "add_generation_prompt", "stream"),
    ("tools", "response_format", "messages"),
    ("n", "best_of", "seed", "stream"),
    ("prompt_logprobs", "prompt", "return_token_ids"),
    ("stop", "include_stop_str_in_output", "stream"),
    ("structured_outputs", "stream", "stop"),
    ("capture", "steering"),
    ("store", "stream", "text"),
)


@dataclass
class Wanted:
    """One request as bytes, and how its client behaves."""

    method: str
    path: str
    raw: bytes
    told: str  # of its body, or its path
    body: Any = None  # None: it is no JSON object any more, or there is none
    is_http: bool = True  # it can be read as HTTP
    leave_after: int | None = None
    half_close: bool = False
    fields: set[str] = field(default_factory=set)

    def __str__(self) -> str:
        manner = f", leaves after {self.leave_after} bytes" if self.leave_after is not None else ""
        return f"{self.method} {self.path} {self.told[:700]}{manner}"


_ID = re.compile(rb'"id": ?"((?:resp_|chatcmpl-|cmpl-|msg_|in_)[^"]{1,200})"')
_MOST_KNOWN = 200


class Requests:
    """Draws requests to all paths of an OpenAPI document."""

    def __init__(self, document: dict[str, Any]) -> None:
        self._known: list[str] = []  # ids out of answers
        self._schemas = document.get("components", {}).get("schemas", {})
        self._operations = [
            (method.upper(), path, operation)
            for path, methods in document["paths"].items()
            for method, operation in methods.items()
        ]
        self._with_body = [one for one in self._operations if "requestBody" in one[2]]

    def learn(self, body: bytes) -> None:
        """Keeps the ids of an answer, to ask about them."""
        self._known += [found.decode() for found in _ID.findall(body[:4000])[:3]]
        del self._known[:-_MOST_KNOWN]

    def draw(self, draw: Random, headers: dict[str, str]) -> Wanted:
        """The next one: three of four have a body. `headers`: what every request has to carry."""
        if draw.random() < 0.03:
            return _no_http(draw)
        pool = self._with_body if draw.random() < 0.8 else self._operations
        method, path, operation = draw.choice(pool)
        target = self._target(draw, path, operation)
        is_odd = draw.random() < 0.03
        if is_odd:
            method = draw.choice(
                ("GET", "PUT", "PATCH", "HEAD", "OPTIONS", "DELETE", "POST", "TRACE", "get", "M-SEARCH")
            )
        if "requestBody" not in operation:
            wanted = Wanted(method, path, b"", target, leave_after=0 if draw.random() < 0.02 else None)
            wanted.raw = request_bytes(method, target, None, {**headers, **_headers(draw, wanted)})
            return wanted
        body = self._body(draw, path, _schema_of(operation))
        wanted = self._sent(draw, method, path, target, body, headers)
        if is_odd:
            wanted.body, wanted.is_http = None, False
        return wanted

    # ---- targets ----------------------------------------------------------------------------------------------------

    def _target(self, draw: Random, path: str, operation: dict[str, Any]) -> str:
        queries = []
        for parameter in operation.get("parameters", ()):
            name, value = parameter["name"], _word(draw)
            if self._known and draw.random() < 0.6 and parameter["schema"].get("type", "string") == "string":
                value = quote(draw.choice(self._known))
            if parameter["in"] == "path":
                path = path.replace(f"{{{name}}}", value).replace(f"{{{name}:path}}", value)
            elif draw.random() < 0.6:
                number = draw.choice((0, 1, 256, -1, 4096, 4097, 2**62, 2**63, 10**30))
                queries.append(f"{name}={number if draw.random() < 0.7 else value}")
        return path + ("?" + "&".join(queries) if queries else "")

    # ---- bodies -----------------------------------------------------------------------------------------------------

    def _body(self, draw: Random, path: str, schema: dict[str, Any]) -> Any:
        schema = self._resolve(schema)
        properties: dict[str, Any] = schema.get("properties", {})
        body = json.loads(json.dumps(BASES.get(path, {})))
        if path not in BASES:  # a path that is new
            body = {name: self._fitting(draw, properties[name], 0) for name in schema.get("required", ())}
        oddness = draw.choices((0.0, 0.35, 1.0), (50, 35, 15))[0]
        names = draw.sample(list(properties), min(len(properties), draw.choice((0, 1, 1, 2, 3, 6))))
        if draw.random() < 0.3:
            names = [name for name in draw.choice(_TOGETHER) if name in properties]
        for name in names:
            body[name] = self._value(draw, name, properties[name], oddness)
        if draw.random() < oddness * 0.2:
            body[draw.choice(("unheard_of", "", "temprature", "__proto__", "a" * 300, "\ud800"))] = 1
        if body and draw.random() < oddness * 0.2:
            del body[draw.choice(list(body))]
        return body

    def _value(self, draw: Random, name: str, schema: dict[str, Any], oddness: float) -> Any:
        if draw.random() < oddness:
            is_number = bool({"minimum", "maximum"} & schema.keys())
            return values.number(draw) if is_number and draw.random() < 0.6 else _hostile(draw)
        if name == "previous_response_id" and self._known and draw.random() < 0.8:
            return draw.choice(self._known)
        if name in _LENGTHS or (name in _LIKELY and draw.random() < 0.7):
            return draw.choice(_LIKELY[name])
        if name in VALID and draw.random() < 0.8:
            return VALID[name](draw)
        return self._fitting(draw, schema, 0)

    def _fitting(self, draw: Random, schema: Any, depth: int) -> Any:
        """A value that the schema allows, about."""
        if not isinstance(schema, dict) or not schema or depth > 6:
            return draw.choice((None, 1, "a", [], {}))
        schema = self._resolve(schema)
        for choice in ("anyOf", "oneOf", "enum"):
            if choice in schema:
                picked = draw.choice(schema[choice])
                return picked if choice == "enum" else self._fitting(draw, picked, depth + 1)
        if "const" in schema:
            return schema["const"]
        kind = schema.get("type")
        kind = draw.choice(kind) if isinstance(kind, list) else kind
        return self._of_type(draw, kind, schema, depth)

    def _of_type(self, draw: Random, kind: Any, schema: dict[str, Any], depth: int) -> Any:
        if kind == "object":
            properties = schema.get("properties", {})
            optional = [name for name in properties if draw.random() < 0.3]
            names = dict.fromkeys([*schema.get("required", ()), *optional])
            return {name: self._fitting(draw, properties.get(name, {}), depth + 1) for name in names}
        if kind == "array":
            count = max(schema.get("minItems", 0), draw.choice((0, 1, 1, 2)))
            return [self._fitting(draw, schema.get("items", {}), depth + 1) for _ in range(count)]
        if kind == "string":
            return draw.choice(("a", "hello", "f", values.text(draw)))
        if kind in ("integer", "number"):
            low, high = schema.get("minimum", 0), schema.get("maximum", 5)
            return draw.choice((low, high, min(high, low + 1), 1))
        return {"boolean": draw.random() < 0.5, "null": None}.get(str(kind), 1)

    def _resolve(self, schema: dict[str, Any]) -> dict[str, Any]:
        while "$ref" in schema:
            schema = self._schemas.get(schema["$ref"].rsplit("/", 1)[-1], {})
        return schema

    # ---- how it is sent -----------------------------------------------------------------------------------------------

    @staticmethod
    def _sent(draw: Random, method: str, path: str, target: str, body: Any, headers: dict[str, str]) -> Wanted:
        try:
            encoded = json.dumps(body, default=str).encode()
        except (ValueError, RecursionError):  # what JSON cannot have: it holds itself, or is too deep
            encoded = b'{"a":' * 80 + b"1" + b"}" * 80
        told, broken = encoded.decode(), draw.random() < 0.1
        leave_after = draw.choice((0, 1, 40, 300)) if draw.random() < 0.1 else None
        wanted = Wanted(method, path, b"", told, body=body if isinstance(body, dict) else None, leave_after=leave_after)
        if isinstance(body, dict):
            wanted.fields = set(map(str, body))
        headers = {**headers, **_headers(draw, wanted)}
        if broken:
            encoded, wanted.told = _broken(draw, encoded)
            wanted.body = None
        if draw.random() < 0.03:
            _cut(draw, wanted, method, target, encoded, headers)
            return wanted
        if draw.random() < 0.05:
            wanted.body = None
            odd = (
                "text/plain",
                "application/x-www-form-urlencoded",
                "",
                "application/json; charset=utf-16",
                "a/b+json",
            )
            headers = {"content-type": draw.choice(odd), **headers}
        wanted.raw = request_bytes(method, target, encoded, headers)
        return wanted


def _schema_of(operation: dict[str, Any]) -> dict[str, Any]:
    content = operation["requestBody"]["content"]
    found: dict[str, Any] = next(iter(content.values())).get("schema", {})
    return found


def _hostile(draw: Random) -> Any:
    """Anything that JSON, or Python's JSON, can say."""
    for _ in range(10):
        value = values.anything(draw)
        try:
            return json.loads(json.dumps(value))
        except (TypeError, ValueError, RecursionError):
            continue
    return None


def _word(draw: Random) -> str:
    """Of a path or a query."""
    words = (
        "tiny",
        "mine",
        "chatcmpl-mine",
        "resp_x",
        "x",
        "..",
        "%00",
        "%ff",
        "%2e%2e%2f",
        "a" * 300,
        "0",
        "nan",
        "é",
    )
    return quote(draw.choice(words), safe="%./")


# (headers, the request is still HTTP and means the same)
_ODD_HEADERS: tuple[tuple[dict[str, str], bool], ...] = (
    ({"x-request-id": "a" * 400}, False),
    ({"x-request-id": "a\x01b"}, False),
    ({"x-request-id": "é"}, False),
    ({"authorization": "Bearer nothing"}, True),
    ({"accept-encoding": "gzip"}, True),
    ({"content-encoding": "gzip"}, False),
    ({"origin": "http://evil.example"}, False),
    ({"host": "evil.example"}, False),
    ({"expect": "100-continue"}, True),
    ({"anthropic-version": "1999-01-01"}, True),
    ({"upgrade": "h2c", "http2-settings": "AAMAAABkAAQAAP__"}, True),
    ({"x-long": "a" * 70_000}, False),
    ({"cookie": "a=b; " * 200}, True),
    ({"te": "trailers"}, True),
)


def _headers(draw: Random, wanted: Wanted) -> dict[str, str]:
    """None, mostly; what they do to the request is noted in it."""
    if draw.random() < 0.9:
        return {}
    headers, is_plain = draw.choice(_ODD_HEADERS)
    wanted.told += f" {values.shown(headers, 100)}"
    if not is_plain:
        wanted.body, wanted.is_http = None, False
    return headers


def _broken(draw: Random, encoded: bytes) -> tuple[bytes, str]:
    """A body that is no JSON any more, or a strange one."""
    place = draw.randrange(len(encoded) + 1)
    ways = (
        encoded[:place],
        encoded[:place] + bytes([draw.randrange(256)]) + encoded[place:],
        encoded[:place] + b"\xff\xfe" + encoded[place:],
        b"\xef\xbb\xbf" + encoded,
        encoded.decode().encode("utf-16"),
        encoded + b"}",
        encoded + encoded,
        b"",
        b" ",
        b"null",
        b"[]",
        b"1" * 1000,
        b'"a"',
        b"[" * 200,
        b"[" * 70 + b"]" * 70,
        b'{"a":' * 100_000,
        encoded.replace(b":", b": NaN, :", 1),
        encoded.replace(b"4", b"NaN"),
        encoded.replace(b"4", b"1e999"),
        encoded.replace(b"4", b"9" * 500),
        encoded[:-1] + b"," + encoded[1:],
        encoded[:-1] + b', "a": "' + b"x" * 300_000 + b'"}',
        b"\0" * 10,
    )
    made = draw.choice(ways)
    return made, values.shown(made, 300)


def _cut(draw: Random, wanted: Wanted, method: str, target: str, encoded: bytes, headers: dict[str, str]) -> None:
    """Less body, or more, than the head says; chunks that are none."""
    kind = draw.randrange(4)
    was_http = wanted.is_http
    wanted.body, wanted.is_http = None, False
    if kind == 0:
        wanted.raw = request_bytes(
            method, target, encoded[: len(encoded) // 2], {**headers, "content-length": str(len(encoded))}
        )
        wanted.half_close = True
    elif kind == 1:
        wanted.raw = request_bytes(
            method, target, encoded + b"x" * 50, {**headers, "content-length": str(len(encoded))}
        )
    elif kind == 2:
        chunks = b"%x\r\n%s\r\n0\r\n\r\n" % (len(encoded), encoded)
        wanted.raw = request_bytes(method, target, chunks, {**headers, "transfer-encoding": "chunked"})
        wanted.is_http = was_http
    else:
        chunks = draw.choice(
            (b"zz\r\n", b"-1\r\n", b"5\r\nab", b"ffffffffffffffffff\r\n", b"1;" + b"a" * 100 + b"\r\nx")
        )
        wanted.raw = request_bytes(method, target, chunks, {**headers, "transfer-encoding": "chunked"})
        wanted.half_close = True
    wanted.told = f"{values.shown(wanted.raw, 400)}"


def _no_http(draw: Random) -> Wanted:
    raw = draw.choice(
        (
            b"\r\n\r\n",
            b"GET\r\n\r\n",
            b"GET / HTTP/9.9\r\nHost: " + HOST.encode() + b"\r\n\r\n",
            b"\x16\x03\x01\x02\x00\x01\x00",
            b"GET / HTTP/1.1\r\n\r\n",
            b"GET / HTTP/1.1\r\nHost: a\r\nHost: b\r\n\r\n",
            b"POST /v1/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: -1\r\n\r\n",
            b"POST /v1/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: 5\r\nContent-Length: 6\r\n\r\nabcdef",
            b"POST /v1/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: 3\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
            b"GET /" + b"a" * 100_000 + b" HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n",
            b"GET / HTTP/1.1\r\nHost: 127.0.0.1\r\n" + b"a: b\r\n" * 200 + b"\r\n",
            b"GET /health HTTP/1.1\r\nHost: 127.0.0.1\r\n bad: folded\r\n\r\n",
            b"GET http://evil.example/ HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n",
            b"OPTIONS * HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n",
            b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
            bytes(draw.randrange(256) for _ in range(200)),
        )
    )
    return Wanted("raw", "", raw, values.shown(raw, 300), is_http=False, half_close=True)
