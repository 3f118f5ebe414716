"""What holds for all tests."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import settings

# A machine that others use too is no reason for a test to fail.
settings.register_profile("pellucid", deadline=None)
settings.load_profile("pellucid")

LAYOUTS = ("slot", "block")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--kv-layout", choices=LAYOUTS, help="pass over tests that are for the other layout of the cache")


def _is_for_other(parameters: dict[str, Any], layout: str) -> bool:
    named = parameters.get("layout")
    return named in LAYOUTS and named != layout


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Of tests with a parameter `layout`, those of the one that was asked for."""
    layout = config.getoption("--kv-layout")
    if layout is None:
        return
    other = {item for item in items if _is_for_other(_parameters(item), layout)}
    config.hook.pytest_deselected(items=list(other))
    items[:] = [item for item in items if item not in other]


def _parameters(item: pytest.Item) -> dict[str, Any]:
    return dict(getattr(getattr(item, "callspec", None), "params", {}))
