"""What holds for all tests."""

from __future__ import annotations

import signal
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
