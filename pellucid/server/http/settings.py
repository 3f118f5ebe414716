"""`ServerSettings`: every setting of the HTTP server, validated when it is made. The options of `pellucid serve` are generated from it."""

from __future__ import annotations

import dataclasses
import ipaddress
import logging
import os
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from typing import Any

from pellucid.errors import ConfigError, shown
from pellucid.json_text import lone_surrogate
from pellucid.text.reasoning_parser import REASONING_DIALECTS
from pellucid.text.tool_dialects import TOOL_DIALECTS

LOG_LEVELS = ("debug", "info", "warning", "error")
API_KEY_VARIABLE = "PELLUCID_API_KEY"
ADMIN_KEY_VARIABLE = "PELLUCID_ADMIN_KEY"
AUTO, OFF = "auto", "off"  # of dialects


def _setting(default: Any, text: str) -> Any:
    return field(default=default, metadata={"help": text})


@dataclass(frozen=True)
class ServerSettings:
    """Settings of the server. Times are in seconds, sizes in bytes.

    Raises:
        ConfigError: naming the field, the value and what is allowed.
    """

    host: str = _setting("127.0.0.1", "Address to listen on; 0.0.0.0 or :: for all.")
    port: int = _setting(8000, "Port to listen on; 0 picks a free one.")
    served_model_name: tuple[str, ...] = _setting(
        (), "Name of the model in the API; more than one are aliases. By default the model's own."
    )
    api_key: tuple[str, ...] = _setting(
        (),
        "Key that every request must carry, but for /health and the files of the page; may be given more than once, "
        f"or as ${API_KEY_VARIABLE}.",
    )
    admin_key: str | None = _setting(None, f"Key for /debug; or ${ADMIN_KEY_VARIABLE}.")
    allowed_hosts: tuple[str, ...] = _setting(
        (),
        "Host names that requests may name, * for any. By default localhost and addresses when the server listens on "
        "a loopback address, any name otherwise.",
    )
    allowed_origins: tuple[str, ...] = _setting((), "Origins that browsers may call from (CORS), * for any.")
    ssl_certfile: str | None = _setting(None, "Certificate for TLS (PEM).")
    ssl_keyfile: str | None = _setting(None, "Its key (PEM).")
    max_waiting: int = _setting(1024, "Most requests that wait for a place; more are answered with 429.")
    hidden_states_total_mb: int = _setting(
        1024,
        "Most MB that hidden states and activations of all requests may take together; more are answered with 429.",
    )
    max_body_bytes: int = _setting(4 << 20, "Longest request body.")
    max_header_bytes: int = _setting(64 << 10, "Longest request line and headers together.")
    max_connections: int = _setting(1024, "Most connections at once; more are answered with 503.")
    header_timeout: float = _setting(30.0, "A request's headers must be complete within this.")
    body_timeout: float = _setting(60.0, "Its body must be complete within this.")
    write_timeout: float = _setting(60.0, "A client that takes nothing for so long is dropped.")
    keep_alive_timeout: float = _setting(75.0, "An idle connection is closed after this.")
    max_stored_responses: int = _setting(
        1024, "Most responses of /v1/responses that are kept in memory, the newest ones; 0 stores none."
    )
    max_stored_bytes: int = _setting(64 << 20, "Most bytes that they take together.")
    request_timeout: float | None = _setting(None, "A request that takes longer ends with an error.")
    drain_timeout: float = _setting(30.0, "On SIGTERM, requests that run may go on for so long.")
    tool_dialect: str = _setting(
        AUTO, f"How the model writes tool calls: {AUTO} (by its chat template), {OFF}, or {', '.join(TOOL_DIALECTS)}."
    )
    reasoning_dialect: str = _setting(
        AUTO,
        f"How the model marks its reasoning: {AUTO} (by its chat template), {OFF}, or {', '.join(REASONING_DIALECTS)}.",
    )
    page: bool = _setting(True, "Serve the page at /: a chat and a live view of the engine.")
    engine_process: bool = _setting(False, "Run the engine in a process of its own; else in a thread.")
    capture: bool = _setting(False, "Let requests capture activations by name.")
    steering: bool = _setting(False, "Let requests add vectors to activations.")
    log_level: str = _setting("info", "Least level that is logged: debug, info, warning or error.")
    log_json: bool = _setting(False, "Log one JSON object a line.")
    log_requests: bool = _setting(True, "Log a line for each request.")
    otlp_endpoint: str | None = _setting(None, "Send OpenTelemetry spans there (needs the extra `otel`).")

    def __post_init__(self) -> None:
        for name, check in _CHECKS.items():
            problem = check(getattr(self, name))
            if problem:
                raise ConfigError(f"{name} is {_shown(name, getattr(self, name))}; {problem}")
        if (self.ssl_certfile is None) != (self.ssl_keyfile is None):
            raise ConfigError("ssl_certfile and ssl_keyfile belong together: give both, or none")

    @classmethod
    def from_options(cls, options: dict[str, Any]) -> ServerSettings:
        """The settings among the options of a verb; keys that were not given come from the environment."""
        names = {entry.name for entry in dataclasses.fields(cls)}
        values = {name: value for name, value in options.items() if name in names and value is not None}
        values = {name: tuple(value) if isinstance(value, list) else value for name, value in values.items()}
        if not values.get("api_key") and os.environ.get(API_KEY_VARIABLE):
            values["api_key"] = (os.environ[API_KEY_VARIABLE],)
        if not values.get("admin_key") and os.environ.get(ADMIN_KEY_VARIABLE):
            values["admin_key"] = os.environ[ADMIN_KEY_VARIABLE]
        return cls(**values)

    @property
    def log_threshold(self) -> int:
        """`log_level` as a number of the logging module."""
        level: int = getattr(logging, self.log_level.upper())
        return level

    @property
    def is_loopback(self) -> bool:
        """True when only this machine can reach the server."""
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return self.host == "localhost"


_SECRETS = frozenset({"api_key", "admin_key"})


def _shown(name: str, value: Any) -> str:
    return "not shown" if name in _SECRETS else shown(value)


def _integer(low: int, high: int) -> Callable[[Any], str | None]:
    def check(value: Any) -> str | None:
        is_integer = isinstance(value, int) and not isinstance(value, bool)
        return None if is_integer and low <= value <= high else f"it must be an integer from {low:,} to {high:,}"

    return check


def _seconds(low: float, high: float, *, optional: bool = False) -> Callable[[Any], str | None]:
    def check(value: Any) -> str | None:
        if value is None and optional:
            return None
        is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
        return None if is_number and low <= value <= high else f"it must be a number from {low:g} to {high:g}"

    return check


def _text(value: Any) -> str | None:
    is_fine = isinstance(value, str) and value.strip() and lone_surrogate(value) is None
    return None if is_fine else "it must be a text that is not empty, and valid UTF-8"


def _optional_text(value: Any) -> str | None:
    return None if value is None else _text(value)


def _texts(value: Any) -> str | None:
    is_fine = isinstance(value, tuple) and all(_text(item) is None for item in value)
    return None if is_fine else "it must be texts that are not empty, and valid UTF-8"


def _key(value: Any) -> str | None:
    is_fine = isinstance(value, str) and value.isascii() and value.isprintable() and value and " " not in value
    return None if is_fine else "it must be printable ASCII without spaces, and not empty"


def _flag(value: Any) -> str | None:
    return None if isinstance(value, bool) else "it must be true or false"


def _one_of(names: Collection[str]) -> Callable[[Any], str | None]:
    return lambda value: None if value in names else f"it must be one of: {', '.join(names)}"


_CHECKS: dict[str, Callable[[Any], str | None]] = {
    "host": _text,
    "port": _integer(0, 65_535),
    "served_model_name": _texts,
    "api_key": lambda value: _texts(value) or next(filter(None, map(_key, value)), None),
    "admin_key": lambda value: None if value is None else _key(value),
    "allowed_hosts": _texts,
    "allowed_origins": _texts,
    "ssl_certfile": _optional_text,
    "ssl_keyfile": _optional_text,
    "max_waiting": _integer(0, 10**6),
    "hidden_states_total_mb": _integer(1, 10**6),
    "max_body_bytes": _integer(1024, 1 << 30),
    "max_header_bytes": _integer(1024, 1 << 24),
    "max_connections": _integer(1, 1 << 20),
    "max_stored_responses": _integer(0, 10**6),
    "max_stored_bytes": _integer(1024, 1 << 36),
    "header_timeout": _seconds(0.1, 86_400),
    "body_timeout": _seconds(0.1, 86_400),
    "write_timeout": _seconds(0.1, 86_400),
    "keep_alive_timeout": _seconds(0.1, 86_400),
    "request_timeout": _seconds(0.01, 864_000, optional=True),
    "drain_timeout": _seconds(0, 86_400),
    "page": _flag,
    "capture": _flag,
    "steering": _flag,
    "engine_process": _flag,
    "tool_dialect": _one_of((AUTO, OFF, *TOOL_DIALECTS)),
    "reasoning_dialect": _one_of((AUTO, OFF, *REASONING_DIALECTS)),
    "log_level": _one_of(LOG_LEVELS),
    "log_json": _flag,
    "log_requests": _flag,
    "otlp_endpoint": _optional_text,
}
