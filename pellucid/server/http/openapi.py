"""The published OpenAPI: bodies are read by our own reader, so their schemas are put in here."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from fastapi import FastAPI
from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

_REF = "#/components/schemas/{model}"
_ERROR = {
    "type": "object",
    "required": ["error"],
    "properties": {
        "error": {
            "type": "object",
            "required": ["message", "type", "param", "code"],
            "properties": {
                "message": {"type": "string"},
                "type": {"type": "string"},
                "param": {"type": ["string", "null"]},
                "code": {"type": ["string", "null"]},
            },
        }
    },
}
_ERROR_ANSWER = {
    "description": "OpenAI's error object",
    "content": {"application/json": {"schema": {"$ref": _REF.format(model="Error")}}},
}


def json_body(model: type[BaseModel]) -> dict[str, Any]:
    """The `openapi_extra` of a path whose body is a `model`."""
    schema = {"$ref": _REF.format(model=model.__name__)}
    return {"requestBody": {"required": True, "content": {"application/json": {"schema": schema}}}}


def publish(app: FastAPI, models: Sequence[type[BaseModel]]) -> None:
    """Makes `app.openapi()`, and so /openapi.json, complete: the schemas of `models`, and errors in our shape."""
    make = app.openapi

    def complete() -> dict[str, Any]:
        document = make()
        _, schemas = models_json_schema([(model, "validation") for model in models], ref_template=_REF)
        known = document.setdefault("components", {}).setdefault("schemas", {})
        known.update(schemas.get("$defs", {}), Error=_ERROR)
        for path in document["paths"].values():
            for operation in path.values():
                operation["responses"].pop("422", None)
                operation["responses"]["default"] = _ERROR_ANSWER
        return document

    app.openapi = complete  # type: ignore[method-assign]
