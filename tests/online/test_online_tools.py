"""Tool calls and reasoning over HTTP, through the official client: forced calls keep to their schemas, and what is streamed is
what the whole answer has."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import jsonschema
import openai
import pytest
from tokenizers import Tokenizer
from utils.http_server import RunningServer, running_server
from utils.real_model import real_model, real_models
from utils.tiny_models import build_tiny_checkpoint

# As Qwen's: shows tools, calls and their results, and can be told not to think.
TEMPLATE = (
    "{% if tools %}<tools>{{ tools | tojson }}</tools>\n{% endif %}"
    "{% for message in messages %}<{{ message.role }}> {{ message.content or '' }}"
    "{% for call in message.tool_calls or [] %}<tool_call>{{ call.function.name }}"
    "{% for key, value in call.function.arguments.items() %} {{ key }}={{ value }}{% endfor %}</tool_call>{% endfor %}\n"
    "{% endfor %}"
    "{% if add_generation_prompt %}<assistant> {% if enable_thinking is defined and enable_thinking %}<think>\n"
    "{% elif enable_thinking is defined %}<think></think>{% endif %}{% endif %}"
)
WEATHER = {
    "type": "object",
    "properties": {
        "city": {"type": "string", "maxLength": 8},
        "days": {"type": "integer", "minimum": 1, "maximum": 9},
        "unit": {"enum": ["C", "F"]},
    },
    "required": ["city", "days"],
    "additionalProperties": False,
}
NOW = {"type": "object", "properties": {}, "additionalProperties": False}
SCHEMAS = {"get_weather": WEATHER, "now": NOW}
TOOLS: Any = [
    {"type": "function", "function": {"name": name, "description": "Tells it.", "parameters": schema, "strict": True}}
    for name, schema in SCHEMAS.items()
]
NAMED = {"type": "function", "function": {"name": "get_weather"}}
MESSAGES: Any = [{"role": "user", "content": "What is the weather in Paris for 3 days?"}]
HISTORY: Any = [
    *MESSAGES,
    {
        "role": "assistant",
        "content": None,
        "tool_calls": [
            {"id": "c1", "type": "function", "function": {"name": "get_weather", "arguments": '{"city": "Paris"}'}}
        ],
    },
    {"role": "tool", "tool_call_id": "c1", "content": "rain"},
]


@pytest.fixture(scope="module")
def tool_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = build_tiny_checkpoint(tmp_path_factory.mktemp("tools"), "llama", max_position_embeddings=2048)
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "chat_template": TEMPLATE}))
    return folder


@pytest.fixture(scope="module")
def tiny(tool_model: Path) -> Iterator[RunningServer]:
    with running_server(tool_model, served_model_name=("m",)) as running:
        yield running


@pytest.fixture(scope="module", params=["random", *real_models()])
def client(request: pytest.FixtureRequest) -> Iterator[openai.OpenAI]:
    if request.param == "random":
        yield _client(request.getfixturevalue("tiny"))
        return
    with running_server(real_model(request.param), served_model_name=("m",), max_model_len=2048) as running:
        yield _client(running)


def _client(server: RunningServer) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=300)


def _accumulated(chunks: Any) -> dict[str, Any]:
    """The message that a stream's chunks join to, in OpenAI's rules: the first piece of a call has its id and name."""
    message: dict[str, Any] = {"content": "", "reasoning": "", "calls": [], "finish_reason": None}
    for chunk in chunks:
        (choice,) = chunk.choices
        message["content"] += choice.delta.content or ""
        extra = choice.delta.model_extra or {}
        assert extra.get("reasoning") == extra.get("reasoning_content")
        message["reasoning"] += extra.get("reasoning") or ""
        for call in choice.delta.tool_calls or []:
            if call.id is not None:
                assert call.index == len(message["calls"])
                assert call.type == "function"
                message["calls"].append([call.function.name, ""])
            assert call.index == len(message["calls"]) - 1
            message["calls"][-1][1] += call.function.arguments or ""
        message["finish_reason"] = choice.finish_reason or message["finish_reason"]
    return message


def _of_whole(choice: Any) -> dict[str, Any]:
    calls = [[call.function.name, call.function.arguments] for call in choice.message.tool_calls or []]
    reasoning = (choice.message.model_extra or {}).get("reasoning") or ""
    assert reasoning == ((choice.message.model_extra or {}).get("reasoning_content") or "")
    content = choice.message.content or ""
    return {"content": content, "reasoning": reasoning, "calls": calls, "finish_reason": choice.finish_reason}


def _asked(client: openai.OpenAI, **more: Any) -> dict[str, Any]:
    """The message of a call, which is the same whole and streamed."""
    arguments = {"model": "m", "messages": MESSAGES, "max_tokens": 400, "temperature": 0.8, "seed": 5, **more}
    whole = _of_whole(client.chat.completions.create(**arguments).choices[0])
    assert _accumulated(client.chat.completions.create(**arguments, stream=True)) == whole
    return whole


# ---- forced calls -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("choice", ["required", "named"])
def test_given_forced_call_when_asked_then_it_is_of_the_schema_streamed_and_whole(
    client: openai.OpenAI, choice: str, seed: int
) -> None:
    tool_choice = NAMED if choice == "named" else "required"
    message = _asked(client, tools=TOOLS, tool_choice=tool_choice, seed=seed, parallel_tool_calls=False)

    assert message["content"] == ""
    ((name, arguments),) = message["calls"]
    jsonschema.validate(json.loads(arguments), SCHEMAS[name])
    assert choice == "required" or name == "get_weather"
    assert message["finish_reason"] == "tool_calls"


def test_given_format_of_the_text_when_a_call_is_forced_then_the_call_is_made(client: openai.OpenAI) -> None:
    """As clients ask that always send both."""
    response_format = {"type": "json_schema", "json_schema": {"name": "n", "schema": {"type": "integer"}}}
    asked: dict[str, Any] = {"tools": TOOLS, "tool_choice": NAMED, "seed": 1, "parallel_tool_calls": False}
    message = _asked(client, response_format=response_format, **asked)
    assert message == _asked(client, **asked)
    assert len(message["calls"]) == 1


def test_given_parallel_calls_when_forced_then_each_is_of_its_schema(client: openai.OpenAI) -> None:
    message = _asked(client, tools=TOOLS, tool_choice="required", temperature=1.0, max_tokens=300)
    complete = message["calls"] if message["finish_reason"] == "tool_calls" else message["calls"][:-1]
    assert message["calls"]
    for name, arguments in complete:
        jsonschema.validate(json.loads(arguments), SCHEMAS[name])


def test_given_forced_call_when_cut_short_then_the_reason_is_length(client: openai.OpenAI) -> None:
    message = _asked(client, tools=TOOLS, tool_choice=NAMED, max_tokens=20)
    assert message["finish_reason"] == "length"


def test_given_forced_call_when_the_clients_own_helper_streams_then_it_reads_the_call(client: openai.OpenAI) -> None:
    arguments: dict[str, Any] = {"model": "m", "messages": MESSAGES, "tools": TOOLS, "tool_choice": NAMED, "seed": 2}
    with client.chat.completions.stream(**arguments, max_tokens=300) as stream:
        pieces = [event for event in stream if event.type == "tool_calls.function.arguments.delta"]
        final = stream.get_final_completion()
    (call,) = final.choices[0].message.tool_calls or []
    jsonschema.validate(json.loads(call.function.arguments), WEATHER)
    assert len(pieces) > 3
    assert call.id.startswith("call_")
    assert call.function.name == "get_weather"


# ---- auto, none -------------------------------------------------------------------------------------------------------


def test_given_conversation_with_calls_and_results_when_it_goes_on_then_it_is_answered(client: openai.OpenAI) -> None:
    for tool_choice in ("auto", "none"):
        message = _asked(client, messages=HISTORY, tools=TOOLS, tool_choice=tool_choice, max_tokens=12)
        assert message["finish_reason"] in ("stop", "length", "tool_calls")


def test_given_tools_and_schema_when_auto_then_the_answer_is_either(client: openai.OpenAI) -> None:
    schema = {"type": "object", "properties": {"n": {"type": "integer", "maximum": 9, "minimum": 0}}, "required": ["n"],
              "additionalProperties": False}  # fmt: skip
    response_format = {"type": "json_schema", "json_schema": {"name": "n", "schema": schema}}
    for seed in range(3):
        message = _asked(client, tools=TOOLS, response_format=response_format, seed=seed, parallel_tool_calls=False)
        if message["calls"]:
            ((name, arguments),) = message["calls"]
            jsonschema.validate(json.loads(arguments), SCHEMAS[name])
        else:
            jsonschema.validate(json.loads(message["content"]), schema)


def _prompt(server: RunningServer, **body: Any) -> str:
    tokens = httpx.post(f"{server.url}/tokenize", json=body, timeout=300).json()["tokens"]
    return str(httpx.post(f"{server.url}/detokenize", json={"tokens": tokens}, timeout=300).json()["prompt"])


def test_given_template_that_shows_tools_when_rendered_then_it_gets_them_and_calls_as_objects(
    tiny: RunningServer,
) -> None:
    prompt = _prompt(tiny, messages=HISTORY, tools=TOOLS)
    shown = json.loads(prompt[prompt.index("<tools>") + 7 : prompt.index("</tools>")])
    assert [tool["function"]["name"] for tool in shown] == list(SCHEMAS)
    assert "<tool_call>get_weather city=Paris</tool_call>" in prompt
    assert "<tool> rain" in prompt


def test_given_template_without_tools_when_rendered_then_the_model_is_told_of_them(tiny_model: Path) -> None:
    with running_server(tiny_model) as server:
        prompt = _prompt(server, messages=HISTORY, tools=TOOLS)
    system, _, rest = prompt.partition("<user>")
    assert system.startswith("<system> ")
    assert '"name": "get_weather"' in system
    assert '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Paris"}}\n</tool_call>' in rest


# ---- reasoning --------------------------------------------------------------------------------------------------------


def test_given_reasoning_in_the_text_when_read_then_it_stands_apart(tiny: RunningServer) -> None:
    said = {"guided_choice": ["<think>so it is</think>\n\nyes"]}
    message = _asked(_client(tiny), extra_body=said)
    assert (message["reasoning"], message["content"]) == ("so it is", "yes")

    hidden = _asked(_client(tiny), extra_body={**said, "include_reasoning": False})
    assert (hidden["reasoning"], hidden["content"]) == ("", "yes")


def test_given_prompt_that_opens_reasoning_when_structured_then_the_structure_stands_behind_it(
    tiny: RunningServer,
) -> None:
    thinking = {"chat_template_kwargs": {"enable_thinking": True}}
    cut = _asked(_client(tiny), extra_body={**thinking, "guided_choice": ["yes"]}, max_tokens=10)
    assert cut["content"] == ""
    assert cut["reasoning"] != ""

    plain = _asked(_client(tiny), extra_body={"guided_choice": ["yes"]}, reasoning_effort="none")
    assert (plain["content"], plain["finish_reason"]) == ("yes", "stop")
    with pytest.raises(openai.BadRequestError, match="reasoning_effort"):
        _asked(_client(tiny), reasoning_effort="low")


def test_given_markers_that_are_special_tokens_when_a_call_is_forced_then_it_is_read(tmp_path: Path) -> None:
    folder = build_tiny_checkpoint(tmp_path, "llama")
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.add_special_tokens(["<tool_call>", "</tool_call>"])
    tokenizer.save(str(folder / "tokenizer.json"))
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "chat_template": TEMPLATE}))
    with running_server(folder, served_model_name=("m",)) as server, _client(server) as client:
        message = _asked(client, messages=[{"role": "user", "content": "hi"}], tools=TOOLS[1:], tool_choice="required",
                         parallel_tool_calls=False, max_tokens=60)  # fmt: skip
    ((name, arguments),) = message["calls"]
    assert (message["content"], name, json.loads(arguments)) == ("", "now", {})


def test_given_dialects_that_are_off_when_asked_then_text_stays_and_tools_are_refused(tool_model: Path) -> None:
    said = "<think>so</think>yes"
    with (
        running_server(tool_model, served_model_name=("m",), tool_dialect="off", reasoning_dialect="off") as server,
        _client(server) as client,
    ):
        assert _asked(client, extra_body={"guided_choice": [said]})["content"] == said
        with pytest.raises(openai.BadRequestError, match="switched off"):
            _asked(client, tools=TOOLS)
        assert _asked(client, tools=TOOLS, tool_choice="none", max_tokens=4)["calls"] == []


@pytest.mark.parametrize("choice", ["auto", "none"])
def test_response_format_that_is_refused_when_beside_tools_then_told_of_it_and_not_of_the_tools(
    tiny: RunningServer, choice: str
) -> None:
    schema = {"type": "object", "properties": {"a": {"type": "string", "pattern": "(?=x)"}}, "required": ["a"]}
    response_format = {"type": "json_schema", "json_schema": {"name": "n", "schema": schema}}
    with pytest.raises(openai.BadRequestError) as refused:
        _asked(_client(tiny), tools=TOOLS, tool_choice=choice, response_format=response_format)
    error = refused.value.body
    assert error["param"] == "response_format"
    assert "response_format.json_schema.schema" in error["message"]


def test_tools_that_are_refused_when_beside_a_good_response_format_then_told_of_the_tools(tiny: RunningServer) -> None:
    schema = {"type": "object", "properties": {"a": {"type": "string", "pattern": "(?=x)"}}, "required": ["a"]}
    tools = [{"type": "function", "function": {"name": "f", "parameters": schema}}]
    good = {"type": "json_schema", "json_schema": {"name": "n", "schema": {"type": "object"}}}
    with pytest.raises(openai.BadRequestError) as refused:
        _asked(_client(tiny), tools=tools, response_format=good)
    assert refused.value.body["param"] == "tools"
