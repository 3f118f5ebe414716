"""The published OpenAPI, and what schemathesis makes of it."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Iterator
from typing import Any

import httpx
import hypothesis
import pytest
import schemathesis
from schemathesis.generation import GenerationMode
from utils.http_server import RunningServer, running_server

_EXAMPLES = 8  # of each path
# What keeps answers short, by path.
_SMALL: dict[str, dict[str, Any]] = {
    "/v1/responses": {"max_output_tokens": 2, "n": 1, "min_tokens": 0},
    "/v1/messages": {"max_tokens": 2, "n": 1, "min_tokens": 0},
    "/v1/messages/count_tokens": {},
}


@pytest.fixture(scope="module")
def server(tiny_model: Any) -> Iterator[RunningServer]:
    with running_server(tiny_model) as running:
        yield running


@pytest.fixture(scope="module")
def document(server: RunningServer) -> dict[str, Any]:
    return dict(httpx.get(f"{server.url}/openapi.json", timeout=300).json())


def test_given_openapi_when_read_then_every_path_and_body_is_there(document: dict[str, Any]) -> None:
    assert {
        "/v1/chat/completions",
        "/v1/completions",
        "/v1/responses",
        "/v1/messages",
        "/v1/models",
        "/tokenize",
        "/detokenize",
        "/health",
    } <= set(document["paths"])
    schemas = document["components"]["schemas"]
    bodies = ("ChatCompletionRequest", "CompletionRequest", "ResponsesRequest", "MessagesRequest", "CountTokensRequest")
    assert {*bodies, "Message", "Error"} <= set(schemas)
    for body in bodies:
        for name, field in schemas[body]["properties"].items():
            assert field.get("description"), (body, name)
        assert schemas[body]["additionalProperties"] is False


@pytest.mark.slow
def test_given_openapi_when_schemathesis_sends_what_it_makes_up_then_no_answer_is_a_5xx(
    server: RunningServer, document: dict[str, Any]
) -> None:
    schema = schemathesis.openapi.from_dict(document)
    statuses: Counter[int] = Counter()
    for result in schema.get_all_operations():
        operation = result.ok()
        for mode in (GenerationMode.POSITIVE, GenerationMode.NEGATIVE):
            statuses += _send(server, operation, mode)
    assert statuses[200] > 0
    assert statuses[400] > 0
    server.wait_until_idle()


def _send(server: RunningServer, operation: Any, mode: GenerationMode) -> Counter[int]:
    """Answers to what was made up for one path, by status."""
    statuses: Counter[int] = Counter()

    @hypothesis.settings(
        max_examples=_EXAMPLES,
        deadline=None,
        database=None,
        derandomize=True,
        suppress_health_check=list(hypothesis.HealthCheck),
    )
    @hypothesis.given(case=operation.as_strategy(generation_mode=mode))
    def run(case: Any) -> None:
        if isinstance(case.body, dict) and mode is GenerationMode.POSITIVE:
            small = {"max_tokens": 2, "n": 1, "min_tokens": 0, "best_of": None}
            case.body = {**case.body, **_SMALL.get(operation.path, small)}
        response = case.call(base_url=server.url, timeout=300)
        assert response.status_code < 500, (case.body, response.text)
        statuses[response.status_code] += 1

    with contextlib.suppress(hypothesis.errors.Unsatisfiable):  # nothing wrong can be said to a path without parameters
        run()
    return statuses
