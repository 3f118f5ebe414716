"""Pellucid: an LLM inference engine you can see into and train through."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from pellucid.version import VERSION

if TYPE_CHECKING:
    from pellucid.api.outputs import RequestOutput as RequestOutput
    from pellucid.api.outputs import StreamChunk as StreamChunk
    from pellucid.api.sampling_params import SamplingParams as SamplingParams
    from pellucid.api.structured_outputs import StructuredOutputsParams as StructuredOutputsParams
    from pellucid.llm import LLM as LLM
    from pellucid.models.registry import ModelRegistry as ModelRegistry

__version__ = VERSION

# Imported when first asked for, so that `import pellucid` costs nothing.
_LAZY = {
    "LLM": "pellucid.llm",
    "ModelRegistry": "pellucid.models.registry",
    "RequestOutput": "pellucid.api.outputs",
    "StreamChunk": "pellucid.api.outputs",
    "SamplingParams": "pellucid.api.sampling_params",
    "StructuredOutputsParams": "pellucid.api.structured_outputs",
}
__all__ = ["LLM", "ModelRegistry", "RequestOutput", "SamplingParams", "StreamChunk", "StructuredOutputsParams"]


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(import_module(_LAZY[name]), name)
    raise AttributeError(f"module 'pellucid' has no attribute {name!r}")
