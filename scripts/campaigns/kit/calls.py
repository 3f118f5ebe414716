"""Random requests for the Python interface: every field of every kind of parameters, valid, at a boundary, or hostile.

The fields are read from the classes and signatures themselves: one that is new gets values of every type by itself.
"""

from __future__ import annotations

import dataclasses
import inspect
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from random import Random
from typing import Any

from kit import values
from kit.values import shown
from pellucid.api.hidden_states import CaptureParams, HiddenStatesParams, SteeringParams
from pellucid.api.request_options import RequestOptions
from pellucid.api.sampling_params import SamplingParams, range_of
from pellucid.api.structured_outputs import StructuredOutputsParams

MAX_MODEL_LEN = 96
WIDTH, VOCAB = 64, 320
Draw = Callable[[Random], Any]

_SCHEMAS: tuple[Any, ...] = (
    {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]},
    {"type": "array", "items": {"enum": [1, "x", None]}, "maxItems": 2},
    {"type": "string", "maxLength": 3},
    {"anyOf": [{"const": i} for i in range(40)]},
    {"anyOf": [{"type": "object", "properties": {f"k{i}": {}}} for i in range(1200)]},
    {"$ref": "#/$defs/missing"},
    {"type": "nothing"},
    {"not": {}},
    {"minimum": 10, "maximum": 1, "type": "integer"},
    {"type": "string", "pattern": "("},
    {"type": "string", "format": "unheard-of"},
    {"x-guidance": {}},
    {"a": math.nan},
    {"\ud800": 1},
    True,
    "{",
    "[]",
    '{"type": "null"}',
)
_REGEXES = (
    "[ab]+",
    "a{3}",
    "(",
    "(?=a)b",
    r"\1",
    "a{1000}",
    "[^\\x00-\\U0010ffff]",
    "é|😀",
    "",
    "(a|b)*c{9}",
    "$^",
    "\ud800",
)
_GRAMMARS = (
    'start: "a" | "b"',
    'root ::= "x" [0-9]+',
    "start:",
    "start: missing",
    "((((",
    'start: "\ud800"',
    "%llguidance {}",
)

# Values that a request may well have, by the name of the field.
VALID: dict[str, Draw] = {
    "n": lambda draw: draw.choice((1, 1, 2, 3)),
    "max_tokens": lambda draw: draw.choice((1, 2, 5, 9, None)),
    "min_tokens": lambda draw: draw.choice((0, 1, 2)),
    "temperature": lambda draw: draw.choice((0, 0.0, 0.7, 1, 2.5)),
    "top_p": lambda draw: draw.choice((0.1, 0.9, 1)),
    "top_k": lambda draw: draw.choice((-1, 0, 1, 5, 400)),
    "min_p": lambda draw: draw.choice((0, 0.1, 1.0)),
    "presence_penalty": lambda draw: draw.uniform(-2, 2),
    "frequency_penalty": lambda draw: draw.uniform(-2, 2),
    "repetition_penalty": lambda draw: draw.choice((0.5, 1.0, 1.2, 10.0)),
    "seed": lambda draw: draw.choice((None, 0, 7, 2**64 - 1, -1)),
    "stop": lambda draw: draw.choice((None, "e", ["a", "the"], (), ["\n"])),
    "stop_token_ids": lambda draw: draw.choice(((), [5, 6], (VOCAB - 1,), None)),
    "include_stop_str_in_output": lambda draw: draw.random() < 0.5,
    "ignore_eos": lambda draw: draw.random() < 0.5,
    "logit_bias": lambda draw: {draw.randrange(VOCAB): draw.uniform(-100, 100) for _ in range(draw.randint(0, 4))},
    "bad_words": lambda draw: draw.choice(((), ["the"], ["e", "a b"])),
    "allowed_token_ids": lambda draw: draw.choice((None, [9], list(range(5, 60)), [VOCAB - 1])),
    "logprobs": lambda draw: draw.choice((None, 0, 1, 5, 100)),
    "prompt_logprobs": lambda draw: draw.choice((None, 0, 1, 5)),
    "skip_special_tokens": lambda draw: draw.random() < 0.5,
    "structured_outputs": lambda draw: draw.choice(
        (None, {"choice": ["yes", "no"]}, {"regex": "[a-c]{2}"}, {"json_object": True}, {"json": _SCHEMAS[0]})
    ),
    "json": lambda draw: draw.choice(_SCHEMAS),
    "regex": lambda draw: draw.choice(_REGEXES),
    "choice": lambda draw: draw.choice((["a"], ("b", "c"), [""], [], ["x" * 2000], ["a"] * 1025, ["\ud800"], [1])),
    "grammar": lambda draw: draw.choice(_GRAMMARS),
    "json_object": lambda draw: True,
    "whitespace_pattern": lambda draw: draw.choice((None, " ?", "(", "[ \n]*")),
    "disable_any_whitespace": lambda draw: draw.random() < 0.5,
    "after": lambda draw: draw.choice((None, "a", "</think>")),
    "priority": lambda draw: draw.choice((0, -1, 5, 2**31 - 1, -(2**31))),
    "cache_salt": lambda draw: draw.choice((None, "a", "b" * 512)),
    "return_hidden_states": lambda draw: draw.random() < 0.8,
    "hidden_states_for_tokens": lambda draw: draw.choice((None, [-1], [0], [0, -1, 3], (2,), [MAX_MODEL_LEN], [-500])),
    "hidden_states_layers": lambda draw: draw.choice((None, [-1], [0, 1, 2], [2], [3], [-2])),
    "hidden_states_stream": lambda draw: draw.random() < 0.5,
    "capture": lambda draw: draw.choice((None, ["layers.0.mlp"], ["layers.*"], ["norm"] * 2, _odd_names(draw))),
    "steering": lambda draw: steering(draw),
    "use_tqdm": lambda draw: draw.choice((None, False)),
    "add_generation_prompt": lambda draw: draw.random() < 0.5,
    "tools": lambda draw: draw.choice((None, [], [{"type": "function", "function": {"name": "f"}}])),
    "chat_template_kwargs": lambda draw: draw.choice((None, {}, {"enable_thinking": False}, {"messages": 1})),
    "request_id": lambda draw: draw.choice((None, "x" * 512, f"id-{draw.randrange(9)}")),
}


def _odd_names(draw: Random) -> list[str]:
    return [
        draw.choice(("nothing", "*", "**", "", "layers.(", "layers.*.mlp", "l" * 300, "*" * draw.choice((2, 3, 40))))
    ]


def steering(draw: Random) -> Any:
    """Vectors of the right width and others; values that are finite and make the model's values infinite among them."""
    scale = draw.choice((0.1, 1.0, 1e-46, 5e-324, 3e38, 1e39, math.nan, math.inf))
    width = WIDTH if draw.random() < 0.8 else draw.choice((0, 1, WIDTH - 1, WIDTH + 1))
    name = draw.choice(("layers.0", "layers.1", "embed_tokens", "layers.0.mlp", "norm", "missing", ""))
    vector: Any = [scale * draw.uniform(0.5, 1) for _ in range(width)]
    return draw.choice((None, {name: vector}, {name: vector}, {name: vector, "layers.1": vector}))


@dataclass
class Call:
    """One call: a method of an engine and what it is given."""

    method: str
    prompt: Any
    params: dict[str, Any] = field(default_factory=dict)  # of SamplingParams
    options: dict[str, Any] = field(default_factory=dict)  # further keywords
    structure: dict[str, Any] | None = None  # of StructuredOutputsParams, made before the call
    odd_params: Any = None  # in place of SamplingParams

    @property
    def fields(self) -> set[str]:
        """What an error may name."""
        named = {"prompt", "inputs", "messages", "prompts", "continuations", "token_ids", "params", "sampling_params"}
        return named | {*self.params, *self.options, "structured_outputs"}

    def __str__(self) -> str:
        params = ", ".join(f"{name}={shown(value)}" for name, value in self.params.items())
        options = ", ".join(f"{name}={shown(value)}" for name, value in self.options.items())
        structure = "" if self.structure is None else f", structured_outputs: {shown(self.structure)}"
        given = f"SamplingParams({params}){structure}" if self.odd_params is None else shown(self.odd_params)
        return f"{self.method}({shown(self.prompt)}, {given}, {options})"


class Calls:
    """Draws calls. The fields come from the classes."""

    def __init__(self, methods: dict[str, Callable[..., Any]]) -> None:
        """`methods`: what can be called, whose keywords beside the prompt and the parameters are drawn too."""
        self._methods = methods
        self._params = [one.name for one in dataclasses.fields(SamplingParams)]
        self._structure = [one.name for one in dataclasses.fields(StructuredOutputsParams)]
        self._options = {name: _keywords(method) for name, method in methods.items()}

    def draw(self, draw: Random) -> Call:
        """The next one: half are well-formed, most others have one odd thing, some are odd all over."""
        oddness = draw.choices((0.0, 0.35, 1.0), (50, 35, 15))[0]
        method = draw.choice(list(self._methods))
        call = Call(method, self._prompt(draw, method, oddness / 2))
        self._fill(draw, call.params, draw.sample(self._params, draw.choice((0, 1, 1, 2, 3, 5))), oddness)
        options = self._options[method]
        self._fill(draw, call.options, draw.sample(options, min(len(options), draw.choice((0, 0, 1, 2)))), oddness)
        if call.options.keys() & {"hidden_states_for_tokens", "hidden_states_layers", "hidden_states_stream"}:
            call.options.setdefault("return_hidden_states", True)
        if draw.random() < 0.06:
            call.structure = {}
            self._fill(draw, call.structure, draw.sample(self._structure, draw.choice((1, 1, 2))), oddness)
        call.params.setdefault("max_tokens", draw.randint(1, 6))
        if draw.random() < 0.02 * oddness:
            call.params["unheard_of"] = 1
        if draw.random() < 0.1 * oddness:
            call.odd_params = values.anything(draw)
        return call

    def _prompt(self, draw: Random, method: str, oddness: float) -> Any:
        if method == "chat":
            return _messages(draw, oddness)
        if method == "score":
            count = draw.choice((1, 1, 2)) if draw.random() < 0.9 else 0
            pair = [[_one_prompt(draw, oddness) for _ in range(count)] for _ in range(2)]
            return pair if draw.random() > oddness else [values.anything(draw), pair[0]]
        if method == "generate_many":
            return [_one_prompt(draw, oddness) for _ in range(draw.choice((0, 1, 2, 3)))]
        return _one_prompt(draw, oddness)

    @staticmethod
    def _fill(draw: Random, into: dict[str, Any], names: list[str], oddness: float) -> None:
        for name in names:
            limits = range_of(name)
            if draw.random() >= oddness and name in VALID:
                into[name] = VALID[name](draw)
            elif draw.random() < 0.4 and limits is not None:
                into[name] = _near(draw, limits[:2])
            elif name == "use_tqdm":  # others show a bar
                into[name] = draw.choice((0, 0.0, "", [], None))
            else:
                into[name] = values.anything(draw)


def _near(draw: Random, ends: tuple[float, float]) -> Any:
    """At an end of a range or just beyond it, as the type that the end has; or a number of any kind."""
    if draw.random() < 0.3:
        return values.number(draw)
    end = draw.choice(ends)
    if isinstance(end, int):
        return end + draw.choice((-1, 0, 1))
    return draw.choice((end, math.nextafter(end, -math.inf), math.nextafter(end, math.inf), -end))


def _one_prompt(draw: Random, oddness: float) -> Any:
    if draw.random() < oddness / 2:
        return values.anything(draw)
    if draw.random() < 0.35:
        return (
            values.text(draw) if draw.random() < 0.2 + oddness else draw.choice(("a", "hello world", "The fox", "é😀"))
        )
    ids = values.token_ids(draw, VOCAB, MAX_MODEL_LEN, oddness)
    return ids if draw.random() < 0.85 else tuple(ids)


def _messages(draw: Random, oddness: float) -> Any:
    if draw.random() < oddness / 4:
        return values.anything(draw)
    found: list[Any] = []
    for _ in range(draw.choice((1, 1, 2)) if draw.random() < 0.95 else 0):
        content = values.text(draw) if draw.random() < 0.2 + oddness else "hello"
        message: Any = {"role": draw.choice(("user", "assistant", "system", "tool")), "content": content}
        if draw.random() < oddness / 2:
            message[draw.choice(("role", "content", "name", "tool_calls"))] = values.anything(draw)
        if draw.random() < oddness / 3:
            message["content"] = [{"type": "text", "text": values.text(draw)}, values.anything(draw)]
        found.append(message if draw.random() >= oddness / 8 else values.anything(draw))
    return found


_NOT_DRAWN = {
    "self",
    "inputs",
    "prompt",
    "prompts",
    "continuations",
    "messages",
    "params",
    "sampling_params",
    "options",
}
_NOT_DRAWN |= {"stream", "texts"}


def _keywords(method: Callable[..., Any]) -> list[str]:
    """Beside those of the request itself; `options` stands for its fields."""
    names = list(inspect.signature(method).parameters)
    found = [name for name in names if name not in _NOT_DRAWN]
    return [*found, *option_names()] if "options" in names else found


def option_names() -> list[str]:
    """The keywords from which `options_of` makes `RequestOptions`."""
    own = [one.name for one in dataclasses.fields(RequestOptions) if one.name != "hidden_states"]
    states = inspect.signature(HiddenStatesParams.from_request).parameters
    return [*own, *(_STATES.get(name, name) for name in states)]


_STATES = {
    "for_tokens": "hidden_states_for_tokens",
    "layers": "hidden_states_layers",
    "stream": "hidden_states_stream",
}


def options_of(given: dict[str, Any]) -> dict[str, Any]:
    """The keywords of a method that takes `options`: what `RequestOptions` has goes there, made as the interfaces make it."""
    states = {name: given[name] for name in ("return_hidden_states", *_STATES.values()) if name in given}
    back = {long: short for short, long in _STATES.items()}
    own: dict[str, Any] = {}
    if states:
        own["hidden_states"] = HiddenStatesParams.from_request(**{back.get(k, k): v for k, v in states.items()})
    makers = {"capture": CaptureParams.from_request, "steering": SteeringParams.from_request}
    for one in dataclasses.fields(RequestOptions):
        if one.name in given:
            own[one.name] = makers[one.name](given[one.name]) if one.name in makers else given[one.name]
    rest = {name: value for name, value in given.items() if name not in own and name not in states}
    return {**rest, "options": RequestOptions(**own)}


def params_of(call: Call) -> Any:
    """What the call gives as its parameters; raises what the constructors raise."""
    if call.odd_params is not None:
        return call.odd_params
    given = dict(call.params)
    if call.structure is not None:
        given["structured_outputs"] = StructuredOutputsParams(**call.structure)
    return SamplingParams(**given)
