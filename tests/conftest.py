"""What holds for all tests."""

from __future__ import annotations

import logging
import signal
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import settings

# A machine that others use too is no reason for a test to fail.
settings.register_profile("pellucid", deadline=None)
settings.load_profile("pellucid")

LAYOUTS = ("slot", "block")


def pytest_configure(config: pytest.Config) -> None:
    """Whoever ends a test run in the middle ends what its tests have started: finalisers run as after Ctrl-C."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--kv-layout", choices=LAYOUTS, help="pass over tests that are for the other layout of the cache")
    parser.addoption("--slow", action="store_true", help="run the tests marked slow too")


def _named_loggers() -> list[logging.Logger]:
    """All loggers but the root, whose handlers belong to pytest."""
    return [logger for logger in logging.root.manager.loggerDict.values() if isinstance(logger, logging.Logger)]


def _loggers_as_before() -> Iterator[None]:
    """A server or a fuzzer that runs in this process sets up logging for itself: whatever comes next finds it undone."""
    disabled = logging.root.manager.disable
    before = {
        logger: (logger.level, logger.propagate, logger.disabled, list(logger.handlers)) for logger in _named_loggers()
    }
    yield
    for logger in _named_loggers():
        level, logger.propagate, logger.disabled, logger.handlers = before.get(
            logger, (logging.NOTSET, True, False, [])
        )
        logger.setLevel(level)
    logging.disable(disabled)


_loggers_of_a_module = pytest.fixture(_loggers_as_before, scope="module", autouse=True)
_loggers_of_a_test = pytest.fixture(_loggers_as_before, autouse=True)


def _is_for_other(parameters: dict[str, Any], layout: str) -> bool:
    named = parameters.get("layout")
    return named in LAYOUTS and named != layout


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Of tests with a parameter `layout`, those of the one that was asked for; slow ones when they were."""
    layout, slow = config.getoption("--kv-layout"), config.getoption("--slow")
    left_out = {
        item
        for item in items
        if (layout is not None and _is_for_other(_parameters(item), layout))
        or (not slow and item.get_closest_marker("slow") is not None)
    }
    config.hook.pytest_deselected(items=list(left_out))
    items[:] = [item for item in items if item not in left_out]


def _parameters(item: pytest.Item) -> dict[str, Any]:
    return dict(getattr(getattr(item, "callspec", None), "params", {}))
