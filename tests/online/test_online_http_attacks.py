"""What arrives below the API: heads without end, bodies without end, silence, foreign hosts. Spoken over a bare socket."""

from __future__ import annotations

import json
import socket
from collections.abc import Iterator
from typing import Any

import pytest
from utils.http_server import RunningServer, running_server
from utils.waiting import until

_PATIENCE = 120.0
_BODY = b'{"prompt":"hi","max_tokens":2}'


@pytest.fixture(scope="module")
def server(tiny_model: Any) -> Iterator[RunningServer]:
    with running_server(tiny_model, max_header_bytes=16 << 10, max_body_bytes=64 << 10, max_connections=8) as running:
        yield running


@pytest.fixture(scope="module")
def impatient(tiny_model: Any) -> Iterator[RunningServer]:
    with running_server(tiny_model, header_timeout=0.5, body_timeout=0.5) as running:
        yield running


def _connect(server: RunningServer) -> socket.socket:
    host, _, port = server.url.removeprefix("http://").rpartition(":")
    return socket.create_connection((host, int(port)), timeout=_PATIENCE)


def _read(connection: socket.socket) -> tuple[int, bytes]:
    """(status, rest) of what the server sends until it closes."""
    data = b""
    try:
        while part := connection.recv(65_536):
            data += part
    except ConnectionResetError:
        pass  # closed with something of ours unread: what came before counts
    return (int(data.split(b" ", 2)[1]) if data else 0), data


def _send(server: RunningServer, *parts: bytes) -> tuple[int, bytes]:
    with _connect(server) as connection:
        try:
            for part in parts:
                connection.sendall(part)
        except (BrokenPipeError, ConnectionResetError):
            pass  # refused before all was sent
        return _read(connection)


def _head(*lines: bytes, host: bytes = b"localhost", line: bytes = b"POST /v1/completions HTTP/1.1") -> bytes:
    own = b"Host: " + host, b"Content-Type: application/json", b"Connection: close"
    return b"\r\n".join([line, *own, *lines]) + b"\r\n\r\n"


def _whole(**kwargs: Any) -> bytes:
    return _head(b"Content-Length: %d" % len(_BODY), **kwargs) + _BODY


_CHUNK = b"1000\r\n" + b"x" * 0x1000 + b"\r\n"
# what is sent -> the status
ATTACKS: dict[str, tuple[tuple[bytes, ...], int]] = {
    "a header of 1 MB": ((_head(b"X: " + b"a" * (1 << 20)),), 431),
    "a header without end": ((b"GET /health HTTP/1.1\r\nHost: localhost\r\nX: " + b"a" * (1 << 20),), 431),
    "a header name without end": ((b"GET /health HTTP/1.1\r\nHost: localhost\r\n" + b"a" * (1 << 20),), 431),
    "100,000 headers": ((_head(*[b"X-%d: 1" % i for i in range(100_000)]),), 431),
    "a path of 1 MB": ((_head(line=b"GET /" + b"a" * (1 << 20) + b" HTTP/1.1"),), 431),
    "a query of 1 MB": ((_head(line=b"GET /debug/steps?since=" + b"1" * (1 << 20) + b" HTTP/1.1"),), 431),
    "a method of 1 MB": ((b"G" * (1 << 20),), 400),
    "an endless chunked body": ((_head(b"Transfer-Encoding: chunked"), *[_CHUNK] * 1000), 413),
    "a chunk of 10^15": ((_head(b"Transfer-Encoding: chunked"), b"FFFFFFFFFFFFF\r\n" + b"x" * (1 << 20)), 413),
    "a length of 10^12": ((_head(b"Content-Length: 1000000000000"), b"x" * (1 << 20)), 413),
    "a length of 10^30": ((_head(b"Content-Length: 1" + b"0" * 30),), 400),
    "a negative length": ((_head(b"Content-Length: -5"),), 400),
    "two lengths": ((_head(b"Content-Length: 5", b"Content-Length: 6"),), 400),
    "a length and chunks": ((_head(b"Content-Length: 5", b"Transfer-Encoding: chunked"),), 400),
    "a chunk that is no number": ((_head(b"Transfer-Encoding: chunked"), b"zz\r\n"), 400),
    "no HTTP": ((b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",), 400),
    "an unknown version": ((b"GET /health HTTP/9.9\r\nHost: localhost\r\n\r\n",), 400),
    "NUL in a header": ((_head(b"X: a\x00b"),), 400),
    "no Host": ((b"GET /health HTTP/1.1\r\nConnection: close\r\n\r\n",), 400),
    "two Hosts": ((_head(b"Host: localhost", line=b"GET /health HTTP/1.1"),), 400),
    "Host with /": ((_whole(host=b"localhost/path"),), 400),
    "Host with ?": ((_whole(host=b"localhost?x=1"),), 400),
    "Host with @": ((_whole(host=b"user@localhost"),), 400),
    "Host with \\": ((_whole(host=b"localhost\\evil"),), 400),
    "Host with a space": ((_whole(host=b"local host"),), 400),
    "Host with #": ((_whole(host=b"localhost#x"),), 400),
    "Host empty": ((_whole(host=b""),), 400),
    "Host with a port of letters": ((_whole(host=b"localhost:port"),), 400),
    "Host that is not ours": ((_whole(host=b"evil.example"),), 400),
    "Host that begins like ours": ((_whole(host=b"localhost.evil.example"),), 400),
    "Host by address": ((_whole(host=b"127.0.0.1:80"),), 200),
    "Host by v6 address": ((_whole(host=b"[::1]:80"),), 200),
    "Host in capitals": ((_whole(host=b"LocalHost"),), 200),
    "a form": ((_head(b"Content-Length: 5").replace(b"application/json", b"text/plain") + b"hello",), 415),
    "a packed body": ((_head(b"Content-Encoding: gzip", b"Content-Length: 5") + b"hello",), 415),
    "a path that climbs": ((_head(line=b"GET /../../etc/passwd HTTP/1.1"),), 404),
    "a path in bytes": ((_head(line=b"GET /v1/models/%ff%00%0a HTTP/1.1"),), 404),
    "a wrong method": ((_head(line=b"DELETE /v1/completions HTTP/1.1"),), 405),
    "an upgrade": ((_head(b"Upgrade: websocket", line=b"GET /health HTTP/1.1"),), 200),
}


@pytest.mark.parametrize("name", ATTACKS)
def test_given_attack_when_sent_then_it_is_refused_and_the_next_is_answered(server: RunningServer, name: str) -> None:
    parts, expected = ATTACKS[name]
    status, data = _send(server, *parts)
    assert status == expected, data[:500]
    if status >= 400:
        body = json.loads(data.partition(b"\r\n\r\n")[2])
        assert body["error"]["message"]
    assert _send(server, _whole())[0] == 200
    server.wait_until_idle()


def test_given_slow_head_when_it_does_not_come_then_the_connection_is_closed(impatient: RunningServer) -> None:
    with _connect(impatient) as connection:
        connection.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: loc")
        status, data = _read(connection)
    assert status == 408
    assert b"header_timeout" in data


def test_given_silent_connection_when_nothing_is_sent_then_it_is_closed(impatient: RunningServer) -> None:
    with _connect(impatient) as connection:
        assert _read(connection)[0] == 408


def test_given_slow_body_when_it_does_not_come_then_the_connection_is_closed(impatient: RunningServer) -> None:
    with _connect(impatient) as connection:
        connection.sendall(_head(b"Content-Length: 30") + b'{"pro')
        status, data = _read(connection)
    assert status == 408
    assert b"0.5 seconds" in data


def test_given_as_many_connections_as_may_when_one_more_comes_then_it_is_told(server: RunningServer) -> None:
    held = [_connect(server) for _ in range(8)]
    try:
        with _connect(server) as one_more:
            status, data = _read(one_more)
        assert status == 503
        assert b"max_connections" in data
    finally:
        for connection in held:
            connection.close()
    until(lambda: _send(server, _whole())[0] == 200, "the end of the others")


def test_given_two_requests_at_once_on_a_connection_when_answered_then_in_order(server: RunningServer) -> None:
    first = _whole().replace(b"Connection: close\r\n", b"")
    with _connect(server) as connection:
        connection.sendall(first + _head(line=b"GET /version HTTP/1.1"))
        _, data = _read(connection)
    assert data.count(b"HTTP/1.1 200") == 2
    assert data.index(b"text_completion") < data.index(b'"version"')
