"""`pellucid compile`: a model as one file that needs neither its checkpoint nor Python."""

from __future__ import annotations

from pathlib import Path

from pellucid.commands.load import packing_progress
from pellucid.config import EngineConfig
from pellucid.core import abi
from pellucid.errors import ConfigError, about
from pellucid.executor.loader import compile_program, open_model
from pellucid.executor.program_cache import PROGRAM_SUFFIX
from pellucid.program.file import open_program_file
from pellucid.program.verify import verify_file
from pellucid.weights.hub import resolve_model


def compile_model(config: EngineConfig, target: Path) -> int:
    """Writes plan, packed weights and tokenizer to `target`; its bytes.

    Raises:
        ForeignOperationError: the model cannot become a program.
        ConfigError: the target has another suffix, or the model is compiled already.
        StorageError: the target cannot be written.
        DamagedFileError: with `verify`, the disk gives back something else than was written.
    """
    if target.suffix != PROGRAM_SUFFIX:
        raise ConfigError(f"output is {target.name!r}; a compiled model ends in {PROGRAM_SUFFIX}")
    path = resolve_model(config.model)
    if path.suffix == PROGRAM_SUFFIX:
        raise ConfigError(f"{path.name} is compiled already")
    context = abi.Context(config.num_threads, config.isa)
    try:
        with packing_progress() as progress, about(path.name):
            compile_program(open_model(path, config), config, context, target, progress)
    finally:
        context.close()
    if config.verify:
        verify_file(open_program_file(target), is_ours=False)
    return target.stat().st_size
