"""What a text must be: OpenAI's `response_format`, vLLM's `structured_outputs` and its older `guided_*`."""

from __future__ import annotations

import re
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
            raise InvalidRequestError(f"response_format.json_schema {needed} type {self.type!r}", "response_format")
        return self


class Structure(NamedTuple):
    """A structure, and the field that asked for it."""

    field: str
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
            raise InvalidRequestError(f"{asked[0]} and {asked[1]} are both given; only one can be", asked[1])
        for name in asked:
            field, make = _READERS[name](getattr(self, name))
            try:
                self._structure = Structure(field, make())
            except InvalidRequestError as error:
                raise renamed(error, field) from None
        return self

    def _is_text(self, name: str) -> bool:
        return name == "response_format" and self.response_format is not None and self.response_format.type == "text"

    @property
    def structure_field(self) -> str:
        """What the request calls the structure of its answer."""
        return FIELD if self._structure is None else self._structure.field

    def sampling_values(self) -> dict[str, Any]:
        """With `structured_outputs`, where a structure is asked for."""
        values = super().sampling_values()
        return values if self._structure is None else {**values, FIELD: self._structure.spec}


_Reader = tuple[str, Callable[[], StructuredOutputsParams]]


def _response_format(given: ResponseFormat) -> _Reader:
    schema = given.json_schema
    if schema is None:
        return "response_format", lambda: StructuredOutputsParams(json_object=True)
    return "response_format.json_schema.schema", lambda: StructuredOutputsParams(json=schema.schema_)


def _structured_outputs(given: Mapping[str, Any]) -> _Reader:
    return FIELD, lambda: StructuredOutputsParams.of(given)


def _guided(kind: str) -> Callable[[Any], _Reader]:
    return lambda given: (f"guided_{kind}", lambda: StructuredOutputsParams(**{kind: given}))


_READERS: dict[str, Callable[[Any], _Reader]] = {
    "response_format": _response_format,
    FIELD: _structured_outputs,
    **{f"guided_{kind}": _guided(kind) for kind in ("json", "regex", "choice", "grammar")},
}


def renamed(error: InvalidRequestError, field: str) -> InvalidRequestError:
    """An error of a structure as one of the field that asked for it; any other error is left as it is."""
    name, param = str(error.param or ""), re.split(r"\W", field)[0]
    if name.partition(".")[0] != FIELD:
        return error
    message = str(error)
    return InvalidRequestError(message if field == FIELD else message.replace(name, field, 1), param)
