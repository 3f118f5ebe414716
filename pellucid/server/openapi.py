"""The published OpenAPI: bodies are read by our own reader, so their schemas are put in here."""

from __future__ import annotations

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


def json_body(model: type[BaseModel]) -> dict[str, Any]:
    """The `openapi_extra` of a path whose body is a `model`."""
    schema = {"$ref": _REF.format(model=model.__name__)}
    return {
        "requestBody": {"required": True, "content": {"application/json": {"schema": schema}}},
        "x-body-model": model,
    }


def publish(app: FastAPI) -> None:
    """Makes `app.openapi()`, and so /openapi.json, complete."""
    make = app.openapi

    def complete() -> dict[str, Any]:
        document = make()
        models = {
            operation.pop("x-body-model")
            for path in document["paths"].values()
            for operation in path.values()
            if "x-body-model" in operation
        }
        ordered = sorted(models, key=lambda model: model.__name__)
        _, schemas = models_json_schema([(model, "validation") for model in ordered], ref_template=_REF)
        known = document.setdefault("components", {}).setdefault("schemas", {})
        known.update(schemas.get("$defs", {}), Error=_ERROR)
        for path in document["paths"].values():
            for operation in path.values():
                answers = operation["responses"]
                answers.pop("422", None)
                answers["default"] = {
                    "description": "OpenAI's error object",
                    "content": {"application/json": {"schema": {"$ref": _REF.format(model="Error")}}},
                }
        return document

    app.openapi = complete  # type: ignore[method-assign]
