"""Pellucid: an LLM inference engine you can see into and train through."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pellucid.entrypoints.llm import LLM as LLM
    from pellucid.models.registry import ModelRegistry as ModelRegistry
    from pellucid.outputs import RequestOutput as RequestOutput
    from pellucid.params import SamplingParams as SamplingParams
    from pellucid.structured import StructuredOutputsParams as StructuredOutputsParams

__version__ = "0.1.0"

# Imported when first asked for, so that `import pellucid` costs nothing.
_LAZY = {
    "LLM": "pellucid.entrypoints.llm",
    "ModelRegistry": "pellucid.models.registry",
    "RequestOutput": "pellucid.outputs",
    "SamplingParams": "pellucid.params",
    "StructuredOutputsParams": "pellucid.structured",
}
__all__ = ["LLM", "ModelRegistry", "RequestOutput", "SamplingParams", "StructuredOutputsParams"]


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(import_module(_LAZY[name]), name)
    raise AttributeError(f"module 'pellucid' has no attribute {name!r}")
