"""Architecture names to model classes. Built-in models are imported only when they are asked for."""

from __future__ import annotations

import hashlib
import importlib
import inspect
from typing import Any

from pellucid.errors import UnsupportedModelError

_BUILT_IN = {
    "LlamaForCausalLM": "pellucid.models.llama:LlamaForCausalLM",
    "MistralForCausalLM": "pellucid.models.llama:LlamaForCausalLM",
    "Qwen2ForCausalLM": "pellucid.models.qwen2:Qwen2ForCausalLM",
    "Qwen3ForCausalLM": "pellucid.models.qwen3:Qwen3ForCausalLM",
    "Gemma3ForCausalLM": "pellucid.models.gemma3:Gemma3ForCausalLM",
}


def _key(architecture: str) -> str:
    return architecture.strip().lower()


class ModelRegistry:
    """Which class serves which architecture. A class that a user registers goes before a built-in one.

    Names are compared stripped and in lower case.
    """

    _registered: dict[str, Any] = {}  # noqa: RUF012

    @classmethod
    def register_model(cls, architecture: str, model_class: Any) -> None:
        """Serves checkpoints whose config names `architecture` with `model_class`.

        Raises:
            ValueError: the name is empty, or the class lacks a part of the model contract.
        """
        name = _key(architecture)
        if not name:
            raise ValueError("architecture is empty")
        missing = [part for part in ("forward", "compute_logits", "load_weights") if not hasattr(model_class, part)]
        if missing:
            raise ValueError(f"{model_class!r} lacks {', '.join(missing)} of the model contract")
        cls._registered[name] = model_class

    @classmethod
    def architectures(cls) -> list[str]:
        """All that can be served, sorted."""
        own = [name for name in cls._registered if name not in map(_key, _BUILT_IN)]
        return sorted([*_BUILT_IN, *own])

    @classmethod
    def resolve(cls, architecture: str) -> Any:
        """The class for an architecture.

        Raises:
            UnsupportedModelError: listing those that are known.
        """
        key = _key(architecture)
        if key in cls._registered:
            return cls._registered[key]
        place = next((place for name, place in _BUILT_IN.items() if _key(name) == key), None)
        if place is None:
            problem = f"unsupported model type {architecture!r}" if key else "the config names no model type"
            raise UnsupportedModelError(f"{problem}; known: {', '.join(cls.architectures())}")
        module, name = place.split(":")
        return getattr(importlib.import_module(module), name)

    @classmethod
    def registered_digest(cls) -> str:
        """Changes with the registered classes and their source: part of the key of a cached program."""
        digest = hashlib.sha256()
        for name, model_class in sorted(cls._registered.items()):
            digest.update(f"{name}={model_class.__module__}.{model_class.__qualname__}\n".encode())
            digest.update((source_of(model_class) or repr(id(model_class))).encode())
        return digest.hexdigest()


def source_of(model_class: Any) -> str:
    """The text of a class; empty where it was typed in and is nowhere written down."""
    try:
        return inspect.getsource(model_class)
    except (OSError, TypeError):
        return ""
