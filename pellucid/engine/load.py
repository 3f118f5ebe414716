"""Making an engine from its configuration."""

from __future__ import annotations

from collections.abc import Callable

from pellucid.config import EngineConfig
from pellucid.engine.engine import LLMEngine
from pellucid.executor.uniproc import UniProcExecutor


def load_engine(config: EngineConfig, progress: Callable[[int, int], None] | None = None) -> LLMEngine:
    """Loads the model and makes its engine; what was begun is freed when that fails.

    `progress(done, total)` is told bytes while the first start packs the weights.

    Raises:
        ConfigError, ModelNotFoundError, UnsupportedModelError, WeightFormatError: what cannot be loaded, and why.
    """
    executor = UniProcExecutor(config, progress)
    try:
        return LLMEngine(config, executor, executor.model.tokenizer)
    except BaseException:
        executor.close()
        raise
