"""Tool calls and reasoning in streamed text: a table of transcripts, and the same calls however the text is cut."""

from __future__ import annotations

import itertools
import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from utils.text_tokenizers import byte_level_metadata, sentencepiece_metadata

from pellucid.errors import InvalidRequestError
from pellucid.structure.grammar import compile_grammar
from pellucid.structure.tool_grammar import forced_calls
from pellucid.text.deltas import ContentDelta, Delta, ReasoningDelta, ToolCallDelta
from pellucid.text.reasoning_parser import REASONING_DIALECTS
from pellucid.text.tokenizer import Tokenizer
from pellucid.text.tool_dialects import TOOL_DIALECTS, Tool, ToolDialect, detect_dialect, tools_of
from pellucid.text.tool_parsers import OutputParser, ToolParser, needs_special_tokens, random_id

WEATHER = Tool(
    "get_weather",
    {
        "type": "object",
        "properties": {
            "city": {"type": "string"},
            "days": {"type": "integer", "minimum": 0, "maximum": 14},
            "hourly": {"type": "boolean"},
        },
        "required": ["city"],
    },
)
TIME = Tool("now", {"type": "object", "properties": {}})
KNOWN = (WEATHER, TIME)
PARIS = ("get_weather", {"city": "Paris", "days": 2})
NOW: tuple[str, dict[str, Any]] = ("now", {})

# dialect, text, content, calls
TRANSCRIPTS: list[tuple[str, str, str, list[tuple[str, Any]]]] = [
    ("hermes", '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Paris", "days": 2}}\n</tool_call>', "", [PARIS]),
    ("hermes", 'Let me look.\n<tool_call>{"arguments": {"city": "Paris", "days": 2}, "name": "get_weather"}</tool_call>\n'
     '<tool_call>\n{"name": "now", "arguments": {}}\n</tool_call>', "Let me look.", [PARIS, NOW]),
    ("hermes", '<tool_call>{"name": "now"}</tool_call> Done.', " Done.", [NOW]),
    ("hermes", '<tool_call>{"name": "f", "arguments": "{\\"a\\": 1}"}</tool_call>', "", [("f", {"a": 1})]),
    ("hermes", '<tool_call>{"type": "function", "id": 7, "function": {"name": "f", "arguments": {"s": "}</tool_call>"}}}</tool_call>',
     "", [("f", {"s": "}</tool_call>"})]),
    ("hermes", '<tool_call>{"name": "f", "arguments": null}</tool_call>', "", [("f", {})]),
    ("hermes", '<tool_call>[{"name": "f", "arguments": {}}, {"name": "g", "arguments": {"a": [1, {"b": "\\""}]}}]</tool_call>',
     "", [("f", {}), ("g", {"a": [1, {"b": '"'}]})]),
    ("hermes", "No call, a < b and <tool box> here. ", "No call, a < b and <tool box> here. ", []),
    ("hermes", "<tool_call>hello</tool_call>", "<tool_call>hello</tool_call>", []),
    ("hermes", '<tool_call>{"name": 5}</tool_call>', '<tool_call>{"name": 5}</tool_call>', []),
    ("hermes", '<tool_call>{"name": "f', '<tool_call>{"name": "f', []),
    ("hermes", "text <tool_ca", "text <tool_ca", []),
    ("qwen3_coder", "<tool_call>\n<function=get_weather>\n<parameter=city>\nParis\n</parameter>\n<parameter=days>\n2\n</parameter>\n"
     "</function>\n</tool_call>", "", [PARIS]),
    ("qwen3_coder", "Hm.\n<function=write>\n<parameter=text>\nif a < b:\n  <b>\n\n</parameter>\n</function>",
     "Hm.", [("write", {"text": "if a < b:\n  <b>\n"})]),
    ("qwen3_coder", "<tool_call>\n<function=now>\n</function>\n</tool_call>", "", [NOW]),
    ("glm", "<tool_call>get_weather\n<arg_key>city</arg_key>\n<arg_value>Paris</arg_value>\n<arg_key>days</arg_key>\n"
     "<arg_value>2</arg_value>\n</tool_call>", "", [PARIS]),
    ("llama3_json", '{"name": "get_weather", "parameters": {"city": "Paris", "days": 2}}', "", [PARIS]),
    ("llama3_json", '<|python_tag|>{"name": "now", "parameters": {}}; {"name": "now", "parameters": {}}', "", [NOW, NOW]),
    ("llama3_json", '{"name": "Bob", "parameters": {"age": 3}}', '{"name": "Bob", "parameters": {"age": 3}}', []),
    ("llama3_json", '{"age": [1, 2]} is it.', '{"age": [1, 2]} is it.', []),
    ("functionary", '<function=get_weather>{"city": "Paris", "days": 2}</function>', "", [PARIS]),
    ("mistral", '[TOOL_CALLS] [{"name": "get_weather", "arguments": {"city": "Paris", "days": 2}}, {"name": "now", "arguments": {}}]',
     "", [PARIS, NOW]),
    ("mistral_args", 'Ok[TOOL_CALLS]get_weather[ARGS]{"city": "Paris", "days": 2}[TOOL_CALLS]now[ARGS]{}', "Ok", [PARIS, NOW]),
    ("pythonic", '[get_weather(city="Paris", days=2), now()]', "", [PARIS, NOW]),
    ("pythonic", '<|python_start|>[f(a=[1, -2.5], b={"k": None}, c=True, d=false, e="),(\\"")]<|python_end|>', "",
     [("f", {"a": [1, -2.5], "b": {"k": None}, "c": True, "d": False, "e": '),("'})]),
    ("pythonic", "[1, 2, 3] is a list", "[1, 2, 3] is a list", []),
    ("pythonic", "[get_weather(__import__('os'))]", "[get_weather(__import__('os'))]", []),
    ("deepseek_v3", "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>get_weather\n```json\n"
     '{"city": "Paris", "days": 2}\n```<｜tool▁call▁end｜><｜tool▁calls▁end｜>', "", [PARIS]),
    ("deepseek_v31", "Yes<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>get_weather<｜tool▁sep｜>"
     '{"city": "Paris", "days": 2}<｜tool▁call▁end｜><｜tool▁call▁begin｜>now<｜tool▁sep｜>{}<｜tool▁call▁end｜><｜tool▁calls▁end｜>',
     "Yes", [PARIS, NOW]),
    ("kimi", "<|tool_calls_section_begin|><|tool_call_begin|>functions.get_weather:0<|tool_call_argument_begin|>"
     '{"city": "Paris", "days": 2}<|tool_call_end|><|tool_calls_section_end|>', "", [PARIS]),
    ("granite", '<|tool_call|>[{"name": "now", "arguments": {}}]', "", [NOW]),
    ("command", '<|START_ACTION|>[{"tool_call_id": "0", "tool_name": "now", "parameters": {}}]<|END_ACTION|>', "", [NOW]),
    ("jamba", '<tool_calls>[{"name": "now", "arguments": {}}]</tool_calls>', "", [NOW]),
    ("phi4", 'functools[{"name": "now", "arguments": {}}]', "", [NOW]),
    ("json", '[{"name": "now", "arguments": {}}, {"name": "get_weather", "arguments": {"city": "Paris", "days": 2}}]', "",
     [NOW, PARIS]),
]  # fmt: skip


def parser(dialect: str, known: tuple[Tool, ...] = KNOWN) -> ToolParser:
    return ToolParser(TOOL_DIALECTS[dialect], known, make_id=lambda index: f"id{index}")


def run(made: ToolParser | OutputParser, pieces: list[str]) -> list[Delta]:
    return [*(delta for piece in pieces for delta in made.feed(piece)), *made.finish()]


def summary(deltas: list[Delta]) -> tuple[str, str, list[tuple[str, str]]]:
    """(content, reasoning, calls); the first delta of a call has its id and name, and no other."""
    content = "".join(delta.text for delta in deltas if isinstance(delta, ContentDelta))
    reasoning = "".join(delta.text for delta in deltas if isinstance(delta, ReasoningDelta))
    calls: list[tuple[str, str]] = []
    for delta in deltas:
        if isinstance(delta, ToolCallDelta):
            assert (delta.id is None) == (delta.name is None) == (delta.index < len(calls))
            if delta.name is not None:
                assert (delta.index, delta.id) == (len(calls), f"id{delta.index}")
                calls.append((delta.name, ""))
            assert delta.index == len(calls) - 1
            calls[-1] = (calls[-1][0], calls[-1][1] + delta.arguments)
    return content, reasoning, calls


def cut(text: str, places: list[int]) -> list[str]:
    ends = sorted({place % (len(text) + 1) for place in places} | {0, len(text)})
    return [text[a:b] for a, b in itertools.pairwise(ends)]


@pytest.mark.parametrize(("dialect", "text", "content", "calls"), TRANSCRIPTS, ids=range(len(TRANSCRIPTS)))
def test_transcript_when_parsed_whole_or_by_characters_then_content_and_calls(
    dialect: str, text: str, content: str, calls: list[tuple[str, Any]]
) -> None:
    for pieces in ([text], list(text)):
        made = parser(dialect)
        found = summary(run(made, pieces))
        assert found[0] == content
        assert [(name, json.loads(arguments)) for name, arguments in found[2]] == calls
        assert not made.problems


@settings(max_examples=300)
@given(st.sampled_from(TRANSCRIPTS), st.lists(st.integers(0, 10_000), max_size=8), st.integers(0, 10_000))
def test_transcript_when_cut_anywhere_and_broken_off_then_same_as_whole(
    row: tuple[str, str, str, Any], places: list[int], end: int
) -> None:
    dialect, text = row[0], row[1]
    text = text[: end % (2 * len(text))]  # every second one is whole
    whole, parts = parser(dialect), parser(dialect)
    assert summary(run(whole, [text])) == summary(run(parts, cut(text, places)))
    assert whole.problems == parts.problems


ALPHABET = ["<tool_call>", "</tool_call>", "[TOOL_CALLS]", '{"name": "f", "arguments": {', "}", "}}", "[", "]", '"', "\\", "<", " ",
            "\n", "x", "f(", "a=1", ")", ",", "<function=f>", "<parameter=a>", "</parameter>", "</function>", ":", "null", "é",
            "<think>", "</think>"]  # fmt: skip


@settings(max_examples=400)
@given(
    st.sampled_from(sorted(TOOL_DIALECTS)),
    st.lists(st.sampled_from(ALPHABET), max_size=25),
    st.lists(st.integers(0, 500)),
)
def test_any_text_when_cut_anywhere_then_no_exception_and_same_as_whole(
    dialect: str, words: list[str], places: list[int]
) -> None:
    text = "".join(words)
    made = [
        OutputParser(REASONING_DIALECTS["think"], TOOL_DIALECTS[dialect], KNOWN, make_id=lambda index: f"id{index}")
        for _ in range(2)
    ]
    assert summary(run(made[0], [text])) == summary(run(made[1], cut(text, places)))
    assert made[0].problems == made[1].problems


@settings(max_examples=100)
@given(st.sampled_from(sorted(TOOL_DIALECTS)), st.text(alphabet="ab <>{}[]|\n(=)\"'", max_size=40))
def test_text_without_calls_when_parsed_then_it_comes_out_as_it_is(dialect: str, text: str) -> None:
    found = summary(run(parser(dialect), list(text)))
    assert found == (text, "", [])


def test_markers_when_fed_by_characters_then_content_never_has_a_part_of_one() -> None:
    text = 'Hi <tool_call>{"name": "f", "arguments": {"a": 1}}</tool_call>'
    made = parser("hermes")
    for index, character in enumerate(text):
        for delta in made.feed(character):
            if isinstance(delta, ContentDelta):
                assert delta.text in ("H", "i"), index


def test_arguments_when_they_stream_then_fragments_come_with_the_text() -> None:
    made = parser("hermes")
    assert made.feed('<tool_call>{"name": "f", "arguments": ') == []
    assert made.feed('{"a": "lo') == [ToolCallDelta(0, "id0", "f", '{"a": "lo')]
    assert made.feed("ng") == [ToolCallDelta(0, arguments="ng")]
    assert made.feed('"}') == [ToolCallDelta(0, arguments='"}')]
    assert made.feed("}</tool_call>") == []


@pytest.mark.parametrize(
    ("dialect", "text", "arguments", "problem"),
    [
        ("hermes", '<tool_call>{"name": "f", "arguments": {"a": 1', '{"a": 1', "tool call 0 breaks off"),
        ("hermes", '<tool_call>{"name": "f", "arguments": {"a": 1]}</tool_call>', '{"a": 1', "does not go on"),
        ("mistral", '[TOOL_CALLS][{"name": "f", "arguments": {}', "{}", "breaks off"),
        ("qwen3_coder", "<function=f>\n<parameter=a>\n1", '{"a": "1', "breaks off"),
        (
            "qwen3_coder",
            "<function=f><parameter=a>\nx\n</parameter>\n<parameter=b>\na </b>\n</para",
            '{"a": "x", "b": "a </b>',
            "breaks off",
        ),
    ],
)
def test_call_when_it_breaks_within_its_arguments_then_told_and_not_content(
    dialect: str, text: str, arguments: str, problem: str
) -> None:
    made = parser(dialect)
    found = summary(run(made, list(text)))
    assert found == ("", "", [("f", arguments)])
    assert len(made.problems) == 1
    assert problem in made.problems[0]


def test_reasoning_when_it_speaks_of_calls_then_only_calls_behind_it_count() -> None:
    text = '<think>I could <tool_call>{"name": "no"}</tool_call> now.</think>\n\n<tool_call>{"name": "now"}</tool_call>'
    made = OutputParser(REASONING_DIALECTS["think"], TOOL_DIALECTS["hermes"], KNOWN, make_id=lambda index: f"id{index}")
    content, reasoning, calls = summary(run(made, list(text)))
    assert (content, calls) == ("", [("now", "{}")])
    assert reasoning == 'I could <tool_call>{"name": "no"}</tool_call> now.'


def test_markers_of_a_dialect_when_compared_then_none_begins_another() -> None:
    for dialect in TOOL_DIALECTS.values():
        found = (*dialect.begins, *dialect.silent)
        assert not [(a, b) for a in found for b in found if a != b and b.startswith(a)], dialect.name


@pytest.mark.parametrize(
    ("template", "model_type", "name"),
    [
        ("{{ '<tool_call>\\n' }}", None, "hermes"),
        ("<tool_call>\n<function=x>\n<parameter=y>", "qwen3", "qwen3_coder"),
        ("<tool_call>{name}\n<arg_key>", None, "glm"),
        ("[TOOL_CALLS] [", None, "mistral"),
        ("[TOOL_CALLS]name[ARGS]", None, "mistral_args"),
        ("<|start_header_id|> ... <|python_tag|>", "llama", "llama3_json"),
        ("[func_name1(params_name1=params_value1)]", "llama", "pythonic"),
        ("<｜tool▁call▁begin｜>function<｜tool▁sep｜>n\n```json\n", None, "deepseek_v3"),
        ("<｜tool▁call▁begin｜>n", None, "deepseek_v31"),
        ("nothing", "qwen2", "hermes"),
        (None, None, "json"),
        ("nothing", "unheard of", "json"),
    ],
)
def test_dialect_when_looked_for_in_a_template_then_found(
    template: str | None, model_type: str | None, name: str
) -> None:
    assert detect_dialect(template, model_type).name == name


@pytest.mark.parametrize(
    ("tools", "text"),
    [
        ([5], "tools[0] must be"),
        ([{"function": {"name": "a b"}}], "tools[0].function.name is 'a b'"),
        ([{"function": {"name": "a", "parameters": []}}], "tools[0].function.parameters must be"),
        ([{"function": {"name": "a"}}, {"function": {"name": "a"}}], "tools names 'a' twice"),
        ([{}] * 129, "tools has 129 entries; the limit is 128"),
    ],
)
def test_tools_when_malformed_then_refused_by_index(tools: list[Any], text: str) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        tools_of(tools)
    assert text in str(caught.value)
    assert caught.value.param == "tools"


def test_ids_when_made_then_as_the_dialect_wants_them_and_different() -> None:
    short, long = (random_id(TOOL_DIALECTS[name]) for name in ("mistral", "hermes"))
    assert len(short(0)) == 9
    assert short(0).isalnum()
    assert short(0) != short(1)
    assert long(0).startswith("call_")
    assert long(0) != long(0)


# ---- forced calls -----------------------------------------------------------------------------------------------------


def tokenizer_with(specials: list[str]) -> Tokenizer:
    """The tokenizer of bytes, with more special tokens."""
    from tokenizers import AddedToken
    from tokenizers import Tokenizer as Backend
    from utils.text_tokenizers import byte_level_backend

    from pellucid.text.backend import SpecialTokens

    backend = Backend.from_str(byte_level_backend().to_str())
    backend.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in specials])
    end = backend.token_to_id("<|im_end|>")
    return Tokenizer(backend, SpecialTokens(eos_token_ids=(end,)))


def write(dialect: ToolDialect, tokenizer: Tokenizer, seed: int, **asked: Any) -> str:
    """A text of the forced grammar: at each step a random token of those that may come, mostly a long one."""
    import random

    import numpy as np

    from pellucid.text.detokenizer import token_bytes_of

    compiled = compile_grammar(forced_calls(dialect, KNOWN, tokenizer, **asked), tokenizer)
    matcher, random_ = compiled.matcher(), random.Random(seed)
    pieces = token_bytes_of(tokenizer, tokenizer.vocab_size)
    ids: list[int] = []
    # what is between markers may be any text: from time to time it comes to its end
    ending = tokenizer.encode(dialect.parameter[2], add_special_tokens=False)
    forced: list[int] = []
    for step in range(600):
        forced = list(ending) if ending and step % 30 == 29 else forced
        matcher.fill()
        assert matcher.error is None
        bits = np.flatnonzero(np.unpackbits(matcher.mask.view(np.uint8), bitorder="little")).tolist()
        ends = [one for one in bits if one in tokenizer.eos_token_ids]
        if ends:
            break
        some = random_.sample(bits, min(len(bits), 8))
        closing = [one for one in some if set(pieces[one]) & set(b'}"])>')]
        best = max(closing or some, key=lambda one: len(pieces[one]))
        wanted = forced.pop(0) if forced else best
        ids.append(wanted if wanted in bits else best)
        matcher.accept(ids[-1])
    else:
        pytest.fail(f"no end after {tokenizer.decode(ids, skip_special_tokens=False)[:2000]}")
    return tokenizer.decode(ids, skip_special_tokens=False)


@pytest.mark.parametrize("special", [False, True], ids=["text", "special tokens"])
@pytest.mark.parametrize("name", sorted(TOOL_DIALECTS))
def test_forced_call_when_written_at_random_then_the_parser_reads_calls_of_the_schema(name: str, special: bool) -> None:
    import jsonschema

    dialect = TOOL_DIALECTS[name]
    markers = [marker for marker in dialect.markers if not marker.startswith(("\n", "functools", "<function"))]
    tokenizer = tokenizer_with(markers if special else [])
    assert needs_special_tokens(tokenizer, dialect) == (special and bool(markers))
    for seed in range(3):
        asked: dict[str, Any] = {"name": "get_weather"} if seed else {"parallel": False}
        text = write(dialect, tokenizer, seed, **asked)
        made = parser(name)
        content, _, calls = summary(run(made, list(text)))
        assert (content, made.problems, len(calls)) == ("", [], 1), text
        tool = {tool.name: tool for tool in KNOWN}[calls[0][0]]
        assert seed == 0 or tool is WEATHER
        jsonschema.validate(json.loads(calls[0][1]), dict(tool.parameters))


@pytest.mark.parametrize(
    ("dialect", "text", "arguments"),
    [
        ("qwen3_coder", "<function=get_weather>\n<parameter=days>\n1", ""),  # of a number nobody knows what is missing
        ("qwen3_coder", "<function=get_weather>\n<parameter=city>\n", ""),
        ("qwen3_coder", "<function=get_weather>\n<parameter=ci", ""),
        ("qwen3_coder", "<function=get_weather>\n<parameter=city>\nPar</", '{"city": "Par'),
        ("glm", "<tool_call>get_weather\n<arg_key>city</arg_key>\n<arg_value>Par", '{"city": "Par'),
    ],
)
def test_value_when_the_text_ends_within_it_then_what_came_of_a_text_is_kept(
    dialect: str, text: str, arguments: str
) -> None:
    for pieces in ([text], list(text)):
        assert summary(run(parser(dialect), pieces)) == ("", "", [("get_weather", arguments)])


# dialect, text, name, arguments: what a parser reads out of escapes can always be sent
NOT_TEXT: list[tuple[str, str, str, str]] = [
    ("hermes", '<tool_call>{"name": "\\ud800", "arguments": {}}</tool_call>', "\ufffd", "{}"),
    ("hermes", '<tool_call>{"name": "\\ud83d\\ude00", "arguments": {}}</tool_call>', "😀", "{}"),
    ("hermes", '<tool_call>{"name": "f", "arguments": "{\\"a\\": \\"\\ud83d\\"}"}</tool_call>', "f", '{"a": "\ufffd"}'),
    ("hermes", '<tool_call>{"name": "f", "arguments": {"a": "\\ud83d"}}</tool_call>', "f", '{"a": "\\ud83d"}'),
    ("qwen3_coder", '<function=g><parameter=u>"\\ud83d"</parameter></function>', "g", '{"u": "\ufffd"}'),
    ("qwen3_coder", '<function=g><parameter=u>"\\ud83d\\ude00"</parameter></function>', "g", '{"u": "😀"}'),
    ("qwen3_coder", "<function=g><parameter=n>NaN</parameter></function>", "g", '{"n": "NaN"}'),
    ("qwen3_coder", "<function=g><parameter=n>-Infinity</parameter></function>", "g", '{"n": "-Infinity"}'),
    ("qwen3_coder", "<function=g><parameter=u>[1e999]</parameter></function>", "g", '{"u": "[1e999]"}'),
    ("qwen3_coder", f"<function=g><parameter=n>{'9' * 5000}</parameter></function>", "g", '{"n": "' + "9" * 5000 + '"}'),
    ("pythonic", '[g(u="\\ud83d\\ude00")]', "g", '{"u": "😀"}'),
    ("pythonic", '[g(u="\\ud83d", v="\\N{GRINNING FACE}\\udc00")]', "g", '{"u": "\ufffd", "v": "😀\ufffd"}'),
]  # fmt: skip
G = Tool("g", {"properties": {"n": {"type": "number"}, "u": {"type": ["string", "array", "null"]}}})


@pytest.mark.parametrize(("dialect", "text", "name", "arguments"), NOT_TEXT, ids=range(len(NOT_TEXT)))
def test_call_of_what_is_no_text_or_no_number_when_read_then_it_can_be_sent(
    dialect: str, text: str, name: str, arguments: str
) -> None:
    for pieces in ([text], list(text)):
        content, _, calls = summary(run(parser(dialect, (G,)), pieces))
        assert (content, calls) == ("", [(name, arguments)])
    json.loads(arguments.encode(), parse_constant=lambda constant: pytest.fail(constant))


@pytest.mark.parametrize("value", ["1e999", "9" * 5000, "float('nan')"])
def test_python_call_of_what_is_no_number_when_read_then_it_is_content(value: str) -> None:
    assert summary(run(parser("pythonic", (G,)), [f"[g(n={value})]"])) == (f"[g(n={value})]", "", [])


def test_text_when_it_goes_on_with_an_answer_then_only_a_marker_begins_a_call() -> None:
    text = '{"name": "now", "arguments": {}}'
    for dialect in ("json", "llama3_json"):
        begun = ToolParser(TOOL_DIALECTS[dialect], KNOWN, has_begun=True)
        assert summary(run(begun, list(text))) == (text, "", [])
        assert summary(run(parser(dialect), list(text))) == ("", "", [("now", "{}")])
    marked = ToolParser(TOOL_DIALECTS["hermes"], KNOWN, has_begun=True, make_id=lambda index: f"id{index}")
    assert summary(run(marked, [f" so<tool_call>{text}</tool_call>"])) == (" so", "", [("now", "{}")])


@pytest.mark.parametrize("name", ["qwen3_coder", "glm", "pythonic"])
def test_forced_call_of_values_that_say_what_a_token_does_when_written_then_they_are_text(name: str) -> None:
    """A client's own words are never spelled by a special token, which would end the output or be left out of it."""
    says = "<|im_start|>"
    tool = Tool("f", {"properties": {"a": {"enum": [says], "type": "string"}}, "required": ["a"]})
    tokenizer = tokenizer_with([])
    spec = forced_calls(TOOL_DIALECTS[name], [tool], tokenizer, parallel=False)
    matcher = compile_grammar(spec, tokenizer).matcher()
    text = {
        "qwen3_coder": "<tool_call>\n<function=f>\n<parameter=a>\n@\n</parameter>\n</function>\n</tool_call>",
        "glm": "<tool_call>f\n<arg_key>a</arg_key>\n<arg_value>@</arg_value>\n</tool_call>",
        "pythonic": '[f(a="@")]',
    }[name]
    before, behind = text.split("@")
    ids = [tokenizer.encode(one, add_special_tokens=False) for one in (before, says[:6], says[6:], behind)]
    assert len(tokenizer.encode(says, add_special_tokens=False)) == 1
    for token_id in itertools.chain(*ids):
        assert matcher.accept(token_id), (tokenizer.id_to_token(token_id), matcher.error)
    assert matcher.is_complete


def test_forced_call_when_the_tokenizer_is_sentencepiece_then_read_too() -> None:
    tokenizer = Tokenizer.from_gguf(sentencepiece_metadata())
    text = write(TOOL_DIALECTS["hermes"], tokenizer, 1, name="get_weather")
    assert [name for name, _ in summary(run(parser("hermes"), [text]))[2]] == ["get_weather"]


def test_forced_call_when_the_prompt_opened_reasoning_then_it_may_reason_first() -> None:
    tokenizer = Tokenizer.from_gguf(byte_level_metadata())
    thinks = REASONING_DIALECTS["think"]
    spec = forced_calls(TOOL_DIALECTS["hermes"], KNOWN, tokenizer, name="now", reasoning=thinks)
    matcher = compile_grammar(spec, tokenizer).matcher()
    text = 'a < b, so I call it.</think>\n<tool_call>\n{"name": "now", "arguments": {}}\n</tool_call>'
    for token_id in tokenizer.encode(text, add_special_tokens=False):
        assert matcher.accept(token_id), matcher.error
    assert matcher.is_complete
    made = OutputParser(thinks, TOOL_DIALECTS["hermes"], KNOWN, starts_inside=True, make_id=lambda index: f"id{index}")
    assert summary(run(made, [text])) == ("", "a < b, so I call it.", [("now", "{}")])


def test_forced_call_when_no_tool_has_the_name_or_a_schema_is_bad_then_refused() -> None:
    tokenizer = Tokenizer.from_gguf(byte_level_metadata())
    with pytest.raises(InvalidRequestError, match="tool_choice names 'f'; the tools are: get_weather, now"):
        forced_calls(TOOL_DIALECTS["hermes"], KNOWN, tokenizer, name="f")
    deep: dict[str, Any] = {}
    for _ in range(200):
        deep = {"items": deep}
    with pytest.raises(InvalidRequestError, match="schema of tool 'f' nests") as caught:
        forced_calls(TOOL_DIALECTS["hermes"], [Tool("f", deep)], tokenizer)
    assert caught.value.param == "tools"
