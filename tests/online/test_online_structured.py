"""Structured output over HTTP: every way to ask for it, and what holds while structures are compiled that take long."""

from __future__ import annotations

import asyncio
import json
import re
import threading
import time
from collections.abc import Iterator
from typing import Any

import httpx
import jsonschema
import openai
import pydantic
import pytest
from utils.http_server import RunningServer, running_server

from pellucid.api.sampling_params import SamplingParams
from pellucid.engine.admission import RequestChecker

MESSAGES: Any = [{"role": "user", "content": "the lazy dog"}]
SHORT = {"type": "string", "maxLength": 4}
SCHEMA = {
    "type": "object",
    "properties": {"name": SHORT, "age": {"type": "integer", "minimum": 0, "maximum": 99}},
    "required": ["name", "age"],
    "additionalProperties": False,
}
STRICT = {"type": "json_schema", "json_schema": {"name": "person", "strict": True, "schema": SCHEMA}}
LARK = 'start: "(" n ("+" n){0,2} ")"\nn: /[0-9]{1,2}/'


@pytest.fixture(scope="module")
def server(tiny_model: Any) -> Iterator[RunningServer]:
    with running_server(tiny_model, served_model_name=("tiny",)) as running:
        yield running


@pytest.fixture(scope="module")
def client(server: RunningServer) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=300) as made:
        yield made


def _is_person(text: str) -> bool:
    jsonschema.validate(json.loads(text), SCHEMA)
    return True


def _matches(pattern: str) -> Any:
    return lambda text: re.fullmatch(pattern, text) is not None


# What is asked for, and what the text must then be.
WAYS: dict[str, tuple[dict[str, Any], Any]] = {
    "response_format schema": ({"response_format": STRICT}, _is_person),
    "structured_outputs json": ({"structured_outputs": {"json": SCHEMA}}, _is_person),
    "structured_outputs json as text": (
        {"structured_outputs": {"json": json.dumps(SCHEMA), "regex": None}},
        _is_person,
    ),
    "structured_outputs regex": ({"structured_outputs": {"regex": "[a-c]{3}"}}, _matches("[a-c]{3}")),
    "structured_outputs after": (
        {"structured_outputs": {"regex": "[a-c]{3}", "after": "e"}},
        _matches(r"(?s)[^e]*e\s{0,4}[a-c]{3}"),
    ),
    "guided_json": ({"guided_json": SCHEMA}, _is_person),
    "guided_regex": ({"guided_regex": r"\d{2}-\d{2}"}, _matches(r"\d{2}-\d{2}")),
    "guided_choice": ({"guided_choice": ["yes", "no"]}, _matches("yes|no")),
    "guided_grammar": ({"guided_grammar": LARK}, _matches(r"\(\d{1,2}(\+\d{1,2}){0,2}\)")),
}


@pytest.mark.parametrize("name", WAYS)
def test_given_structure_when_asked_by_any_name_then_chat_and_completions_keep_to_it(
    client: openai.OpenAI, name: str
) -> None:
    fields, holds = WAYS[name]
    arguments: dict[str, Any] = {
        "model": "tiny",
        "max_tokens": 200,
        "temperature": 1.0,
        "seed": 3,
        "extra_body": fields,
    }
    whole = client.chat.completions.create(messages=MESSAGES, **arguments).choices[0]
    chunks = list(client.chat.completions.create(messages=MESSAGES, stream=True, **arguments))
    completion = client.completions.create(prompt="hello", **arguments).choices[0]

    for text, reason in ((whole.message.content, whole.finish_reason), (completion.text, completion.finish_reason)):
        assert reason == "stop"
        assert holds(text), text
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == whole.message.content


def test_given_json_object_when_asked_then_the_text_begins_as_one(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(
        model="tiny", messages=MESSAGES, response_format={"type": "json_object"}, max_tokens=40, temperature=0
    ).choices[0]
    assert answer.message.content is not None
    assert answer.message.content.lstrip().startswith("{")
    assert answer.finish_reason == "length" or isinstance(json.loads(answer.message.content), dict)


class Colour(pydantic.BaseModel):
    """What the client's own helper asks for."""

    name: str = pydantic.Field(max_length=4)
    shade: int = pydantic.Field(ge=0, le=9)


def test_given_pydantic_model_when_the_client_parses_then_it_gets_one(client: openai.OpenAI) -> None:
    answer = client.chat.completions.parse(
        model="tiny", messages=MESSAGES, response_format=Colour, max_tokens=100, seed=1
    )
    assert isinstance(answer.choices[0].message.parsed, Colour)


def test_given_text_format_when_asked_then_it_changes_nothing(client: openai.OpenAI) -> None:
    arguments: dict[str, Any] = {"model": "tiny", "messages": MESSAGES, "max_tokens": 8, "temperature": 0}
    plain = client.chat.completions.create(**arguments).choices[0].message.content
    assert (
        client.chat.completions.create(**arguments, response_format={"type": "text"}).choices[0].message.content
        == plain
    )


# ---- while structures are compiled ------------------------------------------------------------------------------------


class Compiler:
    """Stands in the way of whatever is compiled, and counts the places in its queue that are taken."""

    def __init__(self, places: int) -> None:
        self.may_go_on = threading.Event()
        self.compiled: list[str] = []
        self.taken, self._places = 0, places
        self._grammar = RequestChecker.grammar

    def grammar(self, checker: RequestChecker, params: SamplingParams) -> Any:
        if threading.current_thread().name.startswith("pellucid-compiler"):
            assert self.may_go_on.wait(300)
            assert params.structured_outputs is not None
            self.compiled.append(str(params.structured_outputs.regex))
        return self._grammar(checker, params)

    def acquire(self, *, blocking: bool) -> bool:
        assert not blocking
        if self.taken == self._places:
            return False
        self.taken += 1
        return True

    def release(self) -> None:
        self.taken -= 1

    async def until_taken(self, count: int) -> None:
        deadline = time.monotonic() + 120
        while self.taken != count:
            assert time.monotonic() < deadline
            await asyncio.sleep(0.01)


@pytest.fixture
def compiler(server: RunningServer, monkeypatch: pytest.MonkeyPatch) -> Compiler:
    made = Compiler(places=3)
    monkeypatch.setattr(RequestChecker, "grammar", lambda checker, params: made.grammar(checker, params))
    monkeypatch.setattr(server.engine, "_compile_places", made)
    return made


def _body(**fields: Any) -> dict[str, Any]:
    return {"prompt": "hi", "max_tokens": 4, **fields}


def test_given_structures_that_take_long_when_others_ask_then_they_do_not_wait(
    server: RunningServer, compiler: Compiler
) -> None:
    known = _body(guided_choice=["known"], max_tokens=20)

    async def run() -> None:
        async with httpx.AsyncClient(base_url=server.url, timeout=300) as http:

            async def ask(**fields: Any) -> httpx.Response:
                return await http.post("/v1/completions", json=_body(**fields))

            first = asyncio.ensure_future(http.post("/v1/completions", json=known))
            await compiler.until_taken(1)
            compiler.may_go_on.set()
            assert (await first).status_code == 200
            compiler.may_go_on.clear()

            slow = []
            for number, word in enumerate(("one", "two", "left")):
                slow.append(asyncio.ensure_future(ask(guided_regex=word)))
                await compiler.until_taken(number + 1)
            assert (await ask()).status_code == 200
            assert (await http.post("/v1/completions", json=known)).status_code == 200
            refused = await ask(guided_regex="four")
            assert refused.status_code == 429
            assert int(refused.headers["retry-after"]) >= 1

            slow.pop().cancel()  # its client leaves
            await compiler.until_taken(2)
            compiler.may_go_on.set()
            assert [(await one).status_code for one in slow] == [200, 200]
            await compiler.until_taken(0)

    asyncio.run(run())
    assert compiler.compiled == ["None", "one", "two"]
    server.wait_until_idle()
