"""Where the tests on a real model find it."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from pellucid.config import DEFAULT_MODEL
from pellucid.weights import hub

# Set by `scripts/run_tests.py --model-path`.
VARIABLE = "PELLUCID_TEST_MODEL"


def real_model() -> Path:
    """The model that was named, else the small one; the test is skipped when it is not pulled."""
    named = os.environ.get(VARIABLE)
    if named:
        return Path(named)
    if not hub.is_pulled(DEFAULT_MODEL):
        pytest.skip(f"{DEFAULT_MODEL} is not pulled: run `pellucid pull {DEFAULT_MODEL}`")
    return hub.resolve_model(DEFAULT_MODEL)
