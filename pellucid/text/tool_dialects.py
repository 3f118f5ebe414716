"""How families of models write tool calls: a table of markers and syntaxes, and how a model's dialect is found."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from pellucid.errors import InvalidRequestError

Syntax = Literal["object", "named", "pythonic", "parameters"]


@dataclass(frozen=True)
class ToolDialect:
    """A way to write tool calls.

    `begins` open calls and `end` closes them; without `end` they end where nothing fits any more. With `at_start` calls may
    also stand at the very beginning of a text, without a marker. `silent` markers are no text at all.

    `syntax` is what stands between: `object`, a JSON object with the name and the arguments, or a list of such, separated by
    whitespace, commas or semicolons; `named`, the name, `name_end`, and the arguments as JSON; `pythonic`, a list of Python
    calls with keyword arguments; `parameters`, the name, `name_end`, and for each argument `parameter` = (what comes before
    the name, before the value, and behind it).
    """

    name: str
    syntax: Syntax
    begins: tuple[str, ...] = ()
    end: str = ""
    at_start: bool = False
    silent: tuple[str, ...] = ()
    name_end: str = ""
    parameter: tuple[str, str, str] = ("", "", "")
    in_list: bool = False  # several calls stand in one list: how a forced call is written
    arguments_key: str = "arguments"  # as a forced call writes it; all known keys are read
    name_key: str = "name"
    name_pattern: str = r"\s*(?P<name>\S+)\s*"
    short_ids: bool = False  # ids of nine letters and digits: the model's template takes no others
    wrap: tuple[str, str] = ("", "")  # what a forced call has around all calls

    @property
    def markers(self) -> tuple[str, ...]:
        """All that is no text."""
        return (*self.begins, *self.silent, *((self.end,) if self.end else ()))


_DEEPSEEK_SECTION = ("<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>")
_KIMI_SECTION = ("<|tool_calls_section_begin|>", "<|tool_calls_section_end|>")

TOOL_DIALECTS = {
    dialect.name: dialect
    for dialect in (
        ToolDialect("hermes", "object", ("<tool_call>",), "</tool_call>"),
        ToolDialect(
            "qwen3_coder",
            "parameters",
            ("<function=",),
            "</function>",
            silent=("<tool_call>", "</tool_call>"),
            name_end=">",
            parameter=("<parameter=", ">", "</parameter>"),
            wrap=("<tool_call>\n", "\n</tool_call>"),
        ),
        ToolDialect(
            "glm",
            "parameters",
            ("<tool_call>",),
            "</tool_call>",
            name_end="\n",
            parameter=("<arg_key>", "</arg_key>\n<arg_value>", "</arg_value>"),
        ),
        ToolDialect("llama3_json", "object", ("<|python_tag|>",), at_start=True, arguments_key="parameters"),
        ToolDialect("functionary", "named", ("<function=",), "</function>", name_end=">"),
        ToolDialect("mistral", "object", ("[TOOL_CALLS]",), in_list=True, short_ids=True),
        ToolDialect("mistral_args", "named", ("[TOOL_CALLS]",), name_end="[ARGS]", short_ids=True),
        ToolDialect("pythonic", "pythonic", ("<|python_start|>",), "<|python_end|>", at_start=True),
        ToolDialect(
            "deepseek_v3",
            "named",
            ("<｜tool▁call▁begin｜>function<｜tool▁sep｜>",),
            "\n```<｜tool▁call▁end｜>",
            silent=_DEEPSEEK_SECTION,
            name_end="\n```json\n",
            wrap=_DEEPSEEK_SECTION,
        ),
        ToolDialect(
            "deepseek_v31",
            "named",
            ("<｜tool▁call▁begin｜>",),
            "<｜tool▁call▁end｜>",
            silent=_DEEPSEEK_SECTION,
            name_end="<｜tool▁sep｜>",
            wrap=_DEEPSEEK_SECTION,
        ),
        ToolDialect(
            "kimi",
            "named",
            ("<|tool_call_begin|>",),
            "<|tool_call_end|>",
            silent=_KIMI_SECTION,
            name_end="<|tool_call_argument_begin|>",
            name_pattern=r"\s*(?:functions\.)?(?P<name>[^\s:]+)(?::\d+)?\s*",
            wrap=_KIMI_SECTION,
        ),
        ToolDialect("granite", "object", ("<|tool_call|>",), at_start=False, in_list=True),
        ToolDialect(
            "command",
            "object",
            ("<|START_ACTION|>",),
            "<|END_ACTION|>",
            in_list=True,
            name_key="tool_name",
            arguments_key="parameters",
        ),
        ToolDialect("jamba", "object", ("<tool_calls>",), "</tool_calls>", in_list=True),
        ToolDialect("phi4", "object", ("functools",), in_list=True),
        ToolDialect("json", "object", at_start=True),
    )
}

# The first whose texts all stand in the chat template. More particular ones come first.
_TEMPLATE_SIGNS: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("qwen3_coder", ("<function=", "<parameter=")),
    ("glm", ("<arg_key>", "<tool_call>")),
    ("hermes", ("<tool_call>",)),
    ("mistral_args", ("[TOOL_CALLS]", "[ARGS]")),
    ("mistral", ("[TOOL_CALLS]",)),
    ("deepseek_v3", ("<｜tool▁call▁begin｜>", "```json")),
    ("deepseek_v31", ("<｜tool▁call▁begin｜>",)),
    ("kimi", ("<|tool_call_begin|>",)),
    ("granite", ("<|tool_call|>",)),
    ("command", ("<|START_ACTION|>",)),
    ("jamba", ("<tool_calls>",)),
    ("phi4", ("functools",)),
    ("functionary", ("<function=",)),
    ("pythonic", ("<|python_start|>",)),
    ("pythonic", ("[func_name1(",)),
    ("llama3_json", ("<|python_tag|>",)),
    ("llama3_json", ('"parameters"', "<|start_header_id|>")),
)
# Where the template says nothing.
_OF_MODEL_TYPE = {"qwen2": "hermes", "qwen3": "hermes", "mistral": "mistral", "llama": "llama3_json", "glm4_moe": "glm"}
DEFAULT_DIALECT = "json"
# Of a model whose template shows no tools, and which is told of them, and how to call them, in the system message.
TOLD_DIALECT = TOOL_DIALECTS["hermes"]


def detect_dialect(chat_template: str | None, model_type: str | None = None) -> ToolDialect:
    """The dialect that a chat template speaks of, else that of the model's type, else plain JSON."""
    template = chat_template or ""
    for name, signs in _TEMPLATE_SIGNS:
        if all(sign in template for sign in signs):
            return TOOL_DIALECTS[name]
    return TOOL_DIALECTS[_OF_MODEL_TYPE.get(model_type or "", DEFAULT_DIALECT)]


@dataclass(frozen=True)
class Tool:
    """A function that a model may call. `parameters` is the JSON schema of its arguments."""

    name: str
    parameters: Mapping[str, Any]

    def type_of(self, parameter: str) -> str:
        """The JSON type of a parameter; "string" where the schema does not say."""
        properties = self.parameters.get("properties")
        schema = properties.get(parameter) if isinstance(properties, Mapping) else None
        kind = schema.get("type") if isinstance(schema, Mapping) else None
        if (
            kind is None
            and isinstance(schema, Mapping)
            and any(key in schema for key in ("anyOf", "oneOf", "$ref", "enum"))
        ):
            return "any"
        return kind if isinstance(kind, str) else "any" if isinstance(kind, list) else "string"


MAX_TOOLS = 128
_NAME = re.compile(r"[A-Za-z0-9_.\-]{1,64}")


def tools_of(tools: Sequence[Mapping[str, Any]]) -> tuple[Tool, ...]:
    """The tools of a request in OpenAI's shape: {"type": "function", "function": {"name": …, "parameters": …}}.

    Raises:
        InvalidRequestError: naming the index and what is wrong with it.
    """
    if len(tools) > MAX_TOOLS:
        raise InvalidRequestError("tools", f"has {len(tools):,} entries", limit=f"the limit is {MAX_TOOLS}")
    made = tuple(_tool(f"tools[{index}]", tool) for index, tool in enumerate(tools))
    names = [tool.name for tool in made]
    twice = next((name for index, name in enumerate(names) if name in names[:index]), None)
    if twice is not None:
        raise InvalidRequestError("tools", f"names {twice!r} twice")
    return made


def _tool(where: str, tool: object) -> Tool:
    function = tool.get("function") if isinstance(tool, Mapping) else None
    if not isinstance(function, Mapping):
        raise InvalidRequestError(where, 'must be {"type": "function", "function": {…}}')
    name, parameters = function.get("name"), function.get("parameters")
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        text = "must be 1 to 64 letters, digits, dots, dashes or underscores"
        raise InvalidRequestError(f"{where}.function.name", f"is {str(name)[:80]!r}", limit=f"it {text}")
    if parameters is not None and not isinstance(parameters, Mapping):
        raise InvalidRequestError(f"{where}.function.parameters", "must be a JSON schema: an object")
    return Tool(name, parameters or {"type": "object", "properties": {}})
