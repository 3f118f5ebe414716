"""The executor of a configuration, by the table of executors."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module

from pellucid.config import EXECUTORS, EngineConfig
from pellucid.contract.executor import Executor
from pellucid.errors import ConfigError

Progress = Callable[[int, int], None]


def make_executor(config: EngineConfig, progress: Progress | None = None) -> Executor:
    """The executor that is registered for the configuration's device and backend; only its module is imported.

    Raises:
        ConfigError: there is none for the two together, or its class cannot be imported.
        ConfigError, ModelNotFoundError, UnsupportedModelError, WeightFormatError, StorageError: the model cannot be loaded.
    """
    key = (config.device, config.distributed_executor_backend)
    target = EXECUTORS.get(key)
    if target is None:
        known = ", ".join(f"{device} with {backend}" for device, backend in EXECUTORS)
        raise ConfigError(f"device is {key[0]!r} with distributed_executor_backend {key[1]!r}; registered: {known}")
    module, _, name = target.partition(":")
    try:
        kind = getattr(import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise ConfigError(f"the executor of {key[0]} with {key[1]}, {target}, cannot be imported: {error}") from error
    executor: Executor = kind(config, progress)
    return executor
