"""Making an engine from its configuration."""

from __future__ import annotations

import logging
from collections.abc import Callable

from pellucid.config import EngineConfig
from pellucid.engine.engine import LLMEngine
from pellucid.errors import PellucidError
from pellucid.executor.registry import make_executor
from pellucid.text.tokenizer import Tokenizer

_log = logging.getLogger(__name__)


def load_engine(
    config: EngineConfig,
    progress: Callable[[int, int], None] | None = None,
    on_failure: Callable[[PellucidError], None] | None = None,
) -> LLMEngine:
    """Loads the model and makes its engine; what was begun is freed when that fails.

    `progress(done, total)` is told bytes while the first start packs the weights. Unless `config.verify` had it done before, the
    packed model is read against its checksums from now on, unnoticed; a bad block ends the engine, and `on_failure` is told so on
    another thread.

    Raises:
        ConfigError, ModelNotFoundError, UnsupportedModelError, WeightFormatError, TokenizerError, StorageError: what
            cannot be loaded, and why.
    """
    executor = make_executor(config, progress)
    try:
        engine = LLMEngine(config, executor, Tokenizer.of(executor.facts))
    except BaseException:
        executor.close()
        raise
    if not config.verify:
        failure = engine.failure  # and not the engine, which nobody else may keep alive

        def on_damage(error: PellucidError) -> None:
            _log.critical("%s (%s)", error, config.model)
            failure.error = error
            if on_failure is not None:
                on_failure(error)

        engine.verification = executor.verify(on_damage)
    return engine
