"""OpenTelemetry spans, where the packages are installed and an endpoint is given."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterable, Mapping
from typing import Any

from pellucid.errors import ConfigError
from pellucid.server.http.settings import ServerSettings

_PACKAGES = ("opentelemetry.sdk.trace", "opentelemetry.exporter.otlp.proto.http.trace_exporter")
_PROPAGATED = frozenset({b"traceparent", b"tracestate"})
# OpenTelemetry's name of an attribute -> the key of a log line.
_ATTRIBUTES = {
    "http.request.method": "method",
    "url.path": "path",
    "http.response.status_code": "status",
    "pellucid.request_id": "request_id",
    "gen_ai.usage.input_tokens": "prompt_tokens",
    "gen_ai.usage.output_tokens": "completion_tokens",
    "gen_ai.response.finish_reasons": "reasons",
    "pellucid.queue_seconds": "queue_seconds",
    "pellucid.first_token_seconds": "first_token_seconds",
}
Fields = Mapping[str, Any]
Headers = Iterable[tuple[bytes, bytes]]


def _is_installed(package: str) -> bool:
    try:
        return importlib.util.find_spec(package) is not None
    except ModuleNotFoundError:
        return False


class Tracing:
    """One span a request, sent to `otlp_endpoint`; without an endpoint, none. A `traceparent` header names the span above it.

    Raises:
        ConfigError: an endpoint is given and the packages are missing.
    """

    def __init__(self, settings: ServerSettings) -> None:
        self._tracer: Any = None
        self._provider: Any = None
        if settings.otlp_endpoint is None:
            return
        missing = [package for package in _PACKAGES if not _is_installed(package)]
        if missing:
            raise ConfigError(
                f"otlp_endpoint is {settings.otlp_endpoint!r}, but {missing[0]} is not installed: "
                "pip install 'pellucid[otel]'"
            )
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor

        self._provider = TracerProvider(resource=Resource.create({"service.name": "pellucid"}))
        self._provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter(endpoint=settings.otlp_endpoint)))
        self._tracer = self._provider.get_tracer("pellucid.server")

    def note(self, answer: Fields, generation: Fields, headers: Headers, began_ns: int, ended_ns: int) -> None:
        """An answer that was given, and what was generated for it; the fields are those of the log lines."""
        if self._tracer is None:
            return
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        carrier = {name.decode("latin-1"): value.decode("latin-1") for name, value in headers if name in _PROPAGATED}
        parent = TraceContextTextMapPropagator().extract(carrier)
        span = self._tracer.start_span(f"{answer['method']} {answer['path']}", context=parent, start_time=began_ns)
        fields = {**generation, **answer}
        span.set_attributes({name: fields[key] for name, key in _ATTRIBUTES.items() if fields.get(key) is not None})
        span.end(end_time=ended_ns)

    def close(self) -> None:
        """Sends what is left."""
        if self._provider is not None:
            self._provider.shutdown()
