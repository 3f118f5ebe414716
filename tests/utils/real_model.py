"""The real models that tests run on."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from pellucid.config import DEFAULT_MODEL
from pellucid.weights import hub

# Names that `pellucid pull` knows, folders or .gguf files, separated by commas. `scripts/run_tests.py --model-path` sets it.
VARIABLE = "PELLUCID_TEST_MODELS"


def real_models() -> list[str]:
    """The models that were named, else the small one."""
    named = [name.strip() for name in os.environ.get(VARIABLE, "").split(",")]
    return [name for name in named if name] or [DEFAULT_MODEL]


def real_model(name: str) -> Path:
    """Where a model lies; the test is skipped when it is not pulled."""
    if Path(name).exists():
        return Path(name)
    if not hub.is_pulled(name):
        pytest.skip(f"{name} is not pulled: run `pellucid pull {name}`")
    return hub.resolve_model(name)
