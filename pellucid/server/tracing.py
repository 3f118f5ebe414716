"""OpenTelemetry spans, where the packages are installed and an endpoint is given."""

from __future__ import annotations

import importlib.util
from typing import Any

from pellucid.errors import ConfigError
from pellucid.server.settings import ServerSettings

_PACKAGES = ("opentelemetry.sdk.trace", "opentelemetry.exporter.otlp.proto.http.trace_exporter")


def _is_installed(package: str) -> bool:
    try:
        return importlib.util.find_spec(package) is not None
    except ModuleNotFoundError:
        return False


class Tracing:
    """One span a request, sent to `otlp_endpoint`; without an endpoint, none.

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

    def note(self, fields: dict[str, Any], began_ns: int, ended_ns: int) -> None:
        """An answer that was given; `fields` as the access log has them."""
        if self._tracer is None:
            return
        span = self._tracer.start_span(f"{fields['method']} {fields['path']}", start_time=began_ns)
        span.set_attributes(
            {
                "http.request.method": fields["method"],
                "url.path": fields["path"],
                "http.response.status_code": fields["status"],
                "pellucid.request_id": fields["request_id"],
            }
        )
        span.end(end_time=ended_ns)

    def close(self) -> None:
        """Sends what is left."""
        if self._provider is not None:
            self._provider.shutdown()
