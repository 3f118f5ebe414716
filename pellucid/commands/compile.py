"""`pellucid compile`: a model as one file that needs neither its checkpoint nor Python."""

from __future__ import annotations

from pathlib import Path

from pellucid.commands.load import packing_progress
from pellucid.config import EngineConfig
from pellucid.errors import ConfigError
from pellucid.executor.loader import PROGRAM_SUFFIX, build_program
from pellucid.ops import abi
from pellucid.weights.hub import resolve_model


def compile_model(config: EngineConfig, target: Path) -> int:
    """Writes plan, packed weights and tokenizer to `target`; its bytes.

    Raises:
        ConfigError: the target has another suffix, or the model is compiled already.
    """
    if target.suffix != PROGRAM_SUFFIX:
        raise ConfigError(f"output is {target.name!r}; a compiled model ends in {PROGRAM_SUFFIX}")
    path = resolve_model(config.model)
    if path.suffix == PROGRAM_SUFFIX:
        raise ConfigError(f"{path.name} is compiled already")
    context = abi.Context(config.num_threads, config.isa)
    try:
        with packing_progress() as progress:
            build_program(path, config, context, target, progress)
    finally:
        context.close()
    return target.stat().st_size
