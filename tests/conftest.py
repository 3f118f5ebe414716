"""What holds for all tests."""

from __future__ import annotations

import logging
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings

# A machine that others use too is no reason for a test to fail.
settings.register_profile("pellucid", deadline=None)
settings.load_profile("pellucid")

LAYOUTS = ("slot", "block")
MARKS = {*LAYOUTS, "mixed", "prefill_first", "padded"}  # of pyproject.toml: what `-m` selects by
_MARK_DEPTH, _MARK_ITEMS = 3, 64  # how far into a parameter they are looked for


def pytest_configure(config: pytest.Config) -> None:
    """Whoever ends a test run in the middle ends what its tests have started: finalisers run as after Ctrl-C."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--kv-layout", choices=LAYOUTS, help="pass over tests that are for the other layout of the cache")
    parser.addoption("--slow", action="store_true", help="run the tests marked slow too")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """A test that takes `real_model` runs on each of them."""
    if "real_model" in metafunc.fixturenames:
        from utils.real_model import real_models

        metafunc.parametrize("real_model", real_models(), indirect=True, scope="session", ids=os.path.basename)


@pytest.fixture(scope="session")
def real_model(request: pytest.FixtureRequest) -> Path:
    """A real model: PELLUCID_TEST_MODELS names them."""
    from utils import real_model

    return real_model.real_model(request.param)


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
    for item in items:
        for name in _named_settings(item):
            item.add_marker(name)
    layout, slow = config.getoption("--kv-layout"), config.getoption("--slow")
    left_out = {
        item
        for item in items
        if (layout is not None and _is_for_other(_parameters(item), layout))
        or (not slow and item.get_closest_marker("slow") is not None)
    }
    config.hook.pytest_deselected(items=list(left_out))
    items[:] = [item for item in items if item not in left_out]


def _named_settings(item: pytest.Item) -> set[str]:
    """The policies and layouts that a test's parameters name, by themselves or as keys of a table of settings in its file."""
    tables = [value for value in vars(getattr(item, "module", None) or object).values() if isinstance(value, dict)]
    given = list(_parameters(item).values())
    given += [table[key] for key in given if isinstance(key, str) for table in tables if key in table]
    return {name for value in given for name in _marks_in(value, _MARK_DEPTH)}


def _marks_in(value: Any, depth: int) -> set[str]:
    """Parameters may be endless or hold themselves: nothing but plain values is looked into, and not far."""
    if type(value) is str:
        return {value} & MARKS
    if type(value) not in (dict, list, tuple) or not depth or len(value) > _MARK_ITEMS:
        return set()
    items = value.values() if type(value) is dict else value
    return {name for item in items for name in _marks_in(item, depth - 1)}


def _parameters(item: pytest.Item) -> dict[str, Any]:
    return dict(getattr(getattr(item, "callspec", None), "params", {}))
