"""docs/http_api.md is what the code says."""

from __future__ import annotations

import pytest
from http_api import DOCUMENT, updated

from pellucid.server.chat.protocol import ChatCompletionRequest


def test_given_document_when_made_anew_then_nothing_changes() -> None:
    found = DOCUMENT.read_text(encoding="utf-8")
    assert updated(found) == found, "run python scripts/http_api.py"
    for name in ChatCompletionRequest.model_fields:
        assert f"| `{name}` |" in found


def test_given_document_without_marks_when_updated_then_it_is_refused() -> None:
    with pytest.raises(ValueError, match="lacks"):
        updated("# nothing")
