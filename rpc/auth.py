"""Who may call: where a daemon listens, which names it answers to, which token it wants."""

from __future__ import annotations

import hmac
import ipaddress
import socket
from collections.abc import Iterable
from pathlib import Path

from imaging.errors import InvalidArgumentError, from_os_error

TOKEN_MAX_BYTES = 4096
"""A header line of aiohttp is at most 8190 bytes."""

LOOPBACK = "127.0.0.1"


def load_token(path: Path) -> str:
    """The token in a file: its first line without blanks. InvalidArgumentError if there is none that fits in a header."""
    try:
        with path.open("rb") as file:
            token = file.read(TOKEN_MAX_BYTES + 1).strip()
    except OSError as err:
        raise from_os_error(err, f"cannot read the token file {path}") from err
    if not token or len(token) > TOKEN_MAX_BYTES or not token.isascii() or any(byte <= 0x20 for byte in token):
        raise InvalidArgumentError(
            f"the token file {path} must hold one word of at most {TOKEN_MAX_BYTES} ASCII characters"
        )
    return token.decode("ascii")


def is_loopback(address: str) -> bool:
    """Whether only this machine reaches the address."""
    literal = _literal(address)
    return address == "localhost" if literal is None else literal.is_loopback


def check_binding(address: str, *, has_token: bool, insecure: bool) -> None:
    """InvalidArgumentError unless the address is loopback, or a token or ``--insecure`` was given."""
    if not (is_loopback(address) or has_token or insecure):
        raise InvalidArgumentError(
            f"refusing to listen on {address}: other machines can reach it. "
            "Give --token-file FILE, so that callers must show a token, or --insecure to serve everybody."
        )


class TokenCheck:
    """Compares a request's bearer token in constant time. Without a token everybody passes."""

    def __init__(self, token: str | None) -> None:
        self._wanted = None if token is None else token.encode()

    def passes(self, authorization: str) -> bool:
        """Whether the ``Authorization`` header holds the token."""
        if self._wanted is None:
            return True
        scheme, _, token = authorization.partition(" ")
        given = token.strip().encode("utf-8", "surrogateescape")
        return hmac.compare_digest(given, self._wanted) and scheme.lower() == "bearer"


class HostCheck:
    """Knows the names a daemon answers to, so that a web page cannot reach it by a name of its own (DNS rebinding).

    Loopback names always; the address it is bound to; names from the configuration. Bound to every address it also answers to any
    address written as numbers, because rebinding needs a name.
    """

    def __init__(self, address: str, names: Iterable[str] = ()) -> None:
        bound = _literal(address)
        self._any_literal = bound is not None and bound.is_unspecified
        own = () if is_loopback(address) else (socket.gethostname(),)
        self._names = {_canonical(name) for name in ("localhost", LOOPBACK, "::1", address, *own, *names)}
        self._seen: dict[str, bool] = {}

    def passes(self, host: str) -> bool:
        """Whether the ``Host`` header names us; the port does not matter."""
        verdict = self._seen.get(host)
        if verdict is not None:
            return verdict
        verdict = self._decide(host)
        if verdict and len(self._seen) < 64:  # a client has one or two spellings; the rest is noise
            self._seen[host] = True
        return verdict

    def _decide(self, host: str) -> bool:
        name = _canonical(_without_port(host))
        return name in self._names or (self._any_literal and _literal(name) is not None)


def _without_port(host: str) -> str:
    if host.startswith("["):
        return host[1:].partition("]")[0]
    return host.rpartition(":")[0] if host.count(":") == 1 else host


def _canonical(name: str) -> str:
    literal = _literal(name)
    return name.lower().removesuffix(".") if literal is None else str(literal)


def _literal(name: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    try:
        return ipaddress.ip_address(name.strip("[]"))
    except ValueError:
        return None
