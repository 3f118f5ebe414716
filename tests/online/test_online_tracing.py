"""OpenTelemetry spans: what a collector is sent of the requests that a server answered."""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import httpx
import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from utils.http_server import running_server

from pellucid.errors import ConfigError
from pellucid.server.http.settings import ServerSettings
from pellucid.server.http.tracing import Tracing

TRACE, SPAN = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
BODY = {"prompt": [5, 6, 7], "max_tokens": 4, "temperature": 0, "ignore_eos": True}


class Collector:
    """Takes spans at `url`."""

    def __init__(self) -> None:
        self.spans: list[Any] = []
        spans = self.spans

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                request = ExportTraceServiceRequest()
                request.ParseFromString(self.rfile.read(int(self.headers["content-length"])))
                for resource in request.resource_spans:
                    for scope in resource.scope_spans:
                        spans.extend(scope.spans)
                self.send_response(200)
                self.send_header("content-length", "0")
                self.end_headers()

            def log_message(self, *_: object) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}/v1/traces"


@pytest.fixture
def collector() -> Iterator[Collector]:
    made = Collector()
    thread = threading.Thread(target=made.server.serve_forever, daemon=True)
    thread.start()
    yield made
    made.server.shutdown()
    thread.join(60)
    made.server.server_close()


def attributes(span: Any) -> dict[str, Any]:
    return {one.key: getattr(one.value, one.value.WhichOneof("value")) for one in span.attributes}


@pytest.mark.parametrize("stream", [False, True])
def test_request_when_answered_then_its_span_has_tokens_times_and_the_callers_trace(
    tiny_model: Path, collector: Collector, stream: bool
) -> None:
    with running_server(tiny_model, otlp_endpoint=collector.url) as server:
        headers = {"traceparent": f"00-{TRACE}-{SPAN}-01", "x-request-id": "mine"}
        body = {**BODY, "stream": stream}
        assert httpx.post(f"{server.url}/v1/completions", json=body, headers=headers, timeout=300).status_code == 200
        assert httpx.get(f"{server.url}/health", headers={"traceparent": "nonsense"}, timeout=300).status_code == 200
        refused = {**BODY, "max_tokens": -1}
        assert httpx.post(f"{server.url}/v1/completions", json=refused, timeout=300).status_code == 400
        # An answer is noted behind its last byte: when another has been given, this one has been.
        assert httpx.get(f"{server.url}/health", timeout=300).status_code == 200
        server.server.context.close()  # sends what is left
    by_status = {attributes(span)["http.response.status_code"]: span for span in collector.spans}
    spans = [span for span in collector.spans if attributes(span).get("pellucid.request_id") == "mine"]
    assert len(spans) == 1
    found = attributes(spans[0])
    assert spans[0].name == "POST /v1/completions"
    assert (spans[0].trace_id.hex(), spans[0].parent_span_id.hex()) == (TRACE, SPAN)
    assert spans[0].end_time_unix_nano > spans[0].start_time_unix_nano
    assert (found["gen_ai.usage.input_tokens"], found["gen_ai.usage.output_tokens"]) == (3, 4)
    assert found["gen_ai.response.finish_reasons"] == "length"
    assert 0 <= found["pellucid.queue_seconds"] <= found["pellucid.first_token_seconds"] < 300
    assert "gen_ai.usage.input_tokens" not in attributes(by_status[400])
    assert any(attributes(span)["url.path"] == "/health" and not span.parent_span_id for span in collector.spans)


@pytest.mark.slow
def test_collector_when_it_is_not_there_then_requests_are_answered(tiny_model: Path) -> None:
    with running_server(tiny_model, otlp_endpoint="http://127.0.0.1:9/v1/traces") as server:
        assert httpx.post(f"{server.url}/v1/completions", json=BODY, timeout=300).status_code == 200


def test_packages_when_they_are_missing_then_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.startswith("opentelemetry.")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "opentelemetry", None)
    with pytest.raises(ConfigError, match="pip install 'pellucid\\[otel\\]'"):
        Tracing(ServerSettings(otlp_endpoint="http://127.0.0.1:1"))
