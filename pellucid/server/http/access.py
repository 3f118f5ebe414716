"""Who may ask: the Host and Origin headers and the keys. Deny by default; only /health and the files of the page are open."""

from __future__ import annotations

import hmac
import ipaddress
import re
from collections.abc import Iterable, Sequence

from pellucid.server.http.errors import HttpError
from pellucid.server.http.settings import ServerSettings

OPEN_PATHS = frozenset({"/health"})
ADMIN_PREFIX = "/debug"
Headers = Sequence[tuple[bytes, bytes]]

_HOST = re.compile(r"^([A-Za-z0-9_](?:[A-Za-z0-9._-]{0,252})|\[[0-9A-Fa-f:.]{2,45}\])(?::[0-9]{1,5})?$")


class Access:
    """Checks of every request before anything else sees it."""

    def __init__(self, settings: ServerSettings, open_paths: Iterable[str] = ()) -> None:
        self._open_paths = OPEN_PATHS.union(open_paths)
        self._hosts = frozenset(name.lower() for name in settings.allowed_hosts)
        self._any_host = "*" in self._hosts or not (self._hosts or settings.is_loopback)
        self._origins = frozenset(settings.allowed_origins)
        self._keys = [key.encode() for key in settings.api_key]
        self._admin_key = None if settings.admin_key is None else settings.admin_key.encode()

    def check(self, path: str, headers: Headers) -> None:
        """Raises HttpError: 400 for the Host header, 403 for a foreign page, 401 or 403 for the key."""
        host = self._check_host(values_of(headers, b"host"))
        self._check_origin(values_of(headers, b"origin"), host)
        if path in self._open_paths or not (self._keys or self._admin_key):
            return
        given = given_key(headers)
        if path == ADMIN_PREFIX or path.startswith(ADMIN_PREFIX + "/"):
            self._check_admin(given)
        elif self._keys and not (_matches(given, self._keys) | self._is_admin(given)):
            raise _unauthorised("this path needs an API key: send it as 'Authorization: Bearer <key>'")

    def _check_origin(self, origins: Sequence[bytes], host: str) -> None:
        """Browsers name the page that asks. CORS keeps answers from a foreign one, but would let its request run."""
        for origin in origins:
            text = origin.decode("latin-1")
            is_own = text.partition("://")[2].lower() == host.lower()
            if not (is_own or text in self._origins or "*" in self._origins):
                raise HttpError(
                    403, f"Origin {text[:80]!r} is not among allowed_origins", "permission_error", code="forbidden"
                )

    def _check_host(self, hosts: Sequence[bytes]) -> str:
        if len(hosts) != 1:
            raise HttpError(400, f"the request has {len(hosts)} Host headers; it must have 1", code="invalid_host")
        text = hosts[0].decode("latin-1")
        found = _HOST.match(text)
        if found is None:
            raise HttpError(
                400, f"Host is {text[:80]!r}; it must be a name or an address, and a port", code="invalid_host"
            )
        name = found[1].lower()
        if not (self._any_host or name in self._hosts or (not self._hosts and _is_local(name))):
            raise HttpError(400, f"Host names {name[:80]!r}, which is not among allowed_hosts", code="invalid_host")
        return text

    def _check_admin(self, given: bytes) -> None:
        if self._admin_key is None:
            raise HttpError(403, "/debug is off: the server has no admin_key", "permission_error", code="forbidden")
        if not self._is_admin(given):
            raise _unauthorised("this path needs the admin key: send it as 'Authorization: Bearer <key>'")

    def _is_admin(self, given: bytes) -> bool:
        return self._admin_key is not None and _matches(given, [self._admin_key])


def values_of(headers: Headers, name: bytes) -> list[bytes]:
    """All values of a header, whose name is in lower case."""
    return [value for key, value in headers if key == name]


def given_key(headers: Headers) -> bytes:
    """The key that a request carries, in OpenAI's header or in Anthropic's; b"" for none."""
    for value in values_of(headers, b"authorization"):
        scheme, _, key = value.partition(b" ")
        if scheme.lower() == b"bearer":
            return key.strip()
    return next(iter(values_of(headers, b"x-api-key")), b"")


def _matches(given: bytes, keys: Iterable[bytes]) -> bool:
    """Compares with every key, in time that depends on none of them."""
    matched = False
    for key in keys:
        matched |= hmac.compare_digest(given, key)
    return matched


def _is_local(name: str) -> bool:
    """localhost or an address: names that no foreign DNS record can point here."""
    if name == "localhost" or name.endswith(".localhost"):
        return True
    try:
        ipaddress.ip_address(name.strip("[]"))
    except ValueError:
        return False
    return True


def _unauthorised(message: str) -> HttpError:
    return HttpError(
        401, message, "authentication_error", code="invalid_api_key", headers={"www-authenticate": "Bearer"}
    )
