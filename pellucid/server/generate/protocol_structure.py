"""What a text must be: OpenAI's `response_format`, vLLM's `structured_outputs` and its older `guided_*`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple

from pydantic import Field, PrivateAttr, model_validator

from pellucid.api.structured_outputs import FIELD, StructuredOutputsParams
from pellucid.errors import InvalidRequestError
from pellucid.server.generate.protocol import RequestFields, Strict


class JsonSchemaFormat(Strict):
    """A JSON schema for an answer."""

    name: str | None = Field(
        None, pattern=r"^[A-Za-z0-9_-]{1,64}$", description="The caller's own; it changes nothing."
    )
    description: str | None = Field(None, description="As name.")
    schema_: dict[str, Any] = Field(alias="schema", description="The schema.")
    strict: bool | None = Field(None, description="The schema is followed in any case.")


class ResponseFormat(Strict):
    """OpenAI's format of an answer."""

    type: Literal["text", "json_object", "json_schema"] = Field(description="What the answer is.")
    json_schema: JsonSchemaFormat | None = Field(None, description="With type json_schema alone.")

    @model_validator(mode="after")
    def _check_schema(self) -> ResponseFormat:
        if (self.type == "json_schema") != (self.json_schema is not None):
            needed = "is required with" if self.json_schema is None else "is not for"
            raise InvalidRequestError("response_format.json_schema", f"{needed} type {self.type!r}")
        return self


class Structure(NamedTuple):
    """A structure, and what the request calls its fields."""

    names: Mapping[str, str]
    spec: StructuredOutputsParams


class StructureFields(RequestFields):
    """The fields, of which a request may have one."""

    response_format: ResponseFormat | None = Field(
        None, description="What the answer must be: any text, any JSON object, or JSON of a schema."
    )
    structured_outputs: dict[str, Any] | None = Field(
        None,
        description="What the text must be: an object with one of json, regex, choice, grammar and json_object; beside them "
        "whitespace_pattern, disable_any_whitespace and after.",
    )
    guided_json: dict[str, Any] | str | None = Field(None, description="As structured_outputs.json.")
    guided_regex: str | None = Field(None, description="As structured_outputs.regex.")
    guided_choice: list[str] | None = Field(None, description="As structured_outputs.choice.")
    guided_grammar: str | None = Field(None, description="As structured_outputs.grammar.")

    _structure: Structure | None = PrivateAttr(None)

    @model_validator(mode="after")
    def _read_structure(self) -> StructureFields:
        """Made here, for long bodies are validated by another thread than the event loop's."""
        asked = [name for name in _READERS if getattr(self, name) is not None and not self._is_text(name)]
        if len(asked) > 1:
            raise InvalidRequestError(asked[1], (f"{asked[0]} and {asked[1]} are both given",), limit="only one can be")
        for name in asked:
            names, make = _READERS[name](getattr(self, name))
            try:
                self._structure = Structure(names, make())
            except InvalidRequestError as error:
                raise error.named(names) from None
        return self

    def _is_text(self, name: str) -> bool:
        return name == "response_format" and self.response_format is not None and self.response_format.type == "text"

    @property
    def field_names(self) -> Mapping[str, str]:
        """Those of the structure."""
        return {} if self._structure is None else self._structure.names

    def sampling_values(self) -> dict[str, Any]:
        """With `structured_outputs`, where a structure is asked for."""
        values = super().sampling_values()
        return values if self._structure is None else {**values, FIELD: self._structure.spec}


_Reader = tuple[Mapping[str, str], Callable[[], StructuredOutputsParams]]


def _called(field: str, kind: str) -> Mapping[str, str]:
    """The names where `field` asks for a structure of this kind."""
    return {FIELD: field, f"{FIELD}.{kind}": field}


def _response_format(given: ResponseFormat) -> _Reader:
    schema = given.json_schema
    if schema is None:
        return _called("response_format", "json_object"), lambda: StructuredOutputsParams(json_object=True)
    return _called("response_format.json_schema.schema", "json"), lambda: StructuredOutputsParams(json=schema.schema_)


def _structured_outputs(given: Mapping[str, Any]) -> _Reader:
    return {}, lambda: StructuredOutputsParams.of(given)


def _guided(kind: str) -> Callable[[Any], _Reader]:
    return lambda given: (_called(f"guided_{kind}", kind), lambda: StructuredOutputsParams(**{kind: given}))


_READERS: dict[str, Callable[[Any], _Reader]] = {
    "response_format": _response_format,
    FIELD: _structured_outputs,
    **{f"guided_{kind}": _guided(kind) for kind in ("json", "regex", "choice", "grammar")},
}
