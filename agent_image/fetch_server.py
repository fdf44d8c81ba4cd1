"""Where images come from: the image server and the URL of each image.

The server is HOST, HOST:PORT or a URL. HOST alone is looked up in the DNS as the owner of SRV records, as the program
this one replaces did: the record with the lowest priority (and the largest weight among those) names host and port. A host
without such a record, an address, and ``localhost`` mean the image service's own port.
"""

from __future__ import annotations

import ipaddress
import logging
import re
from collections.abc import Callable
from urllib.parse import urljoin, urlsplit

import dns.exception
import dns.resolver

from imaging.errors import InvalidArgumentError

DEFAULT_PORT = 20000
"""Where the image service listens unless told otherwise."""

SRV_TIMEOUT_S = 5.0
"""All servers of resolv.conf together; a fetch that finds none goes on with the default port."""

SOURCE_MAX_CHARS = 4096
"""What web servers take as a request line, about."""

_HOST = re.compile(r"[A-Za-z0-9._:%-]+\Z")

log = logging.getLogger(__name__)

SrvLookup = Callable[[str], tuple[str, int] | None]


def lookup_srv(host: str) -> tuple[str, int] | None:
    """Host and port of the best SRV record of ``host``; None if there is none or the DNS does not answer."""
    try:
        answer = dns.resolver.resolve(host, "SRV", lifetime=SRV_TIMEOUT_S, search=True)
    except dns.exception.DNSException as err:
        log.info("no SRV record", extra={"host": host, "cause": type(err).__name__})
        return None
    best = min(answer, key=lambda record: (record.priority, -record.weight))
    return str(best.target).rstrip("."), int(best.port)


def _is_literal(host: str) -> bool:
    """Whether the DNS has nothing to say about a host."""
    try:
        ipaddress.ip_address(host.strip("[]"))
    except ValueError:
        return host == "localhost"
    return True


class ImageServer:
    """The server that images without an absolute source come from."""

    def __init__(self, address: str, *, token: str = "", lookup: SrvLookup = lookup_srv) -> None:
        self._token = token
        self._lookup = lookup
        scheme, _, rest = address.rpartition("://")
        self._scheme = scheme or "http"
        if self._scheme not in {"http", "https"}:
            raise InvalidArgumentError(f"the image service must be HOST, HOST:PORT or an http URL: {address!r}")
        self._host, self._port = _split_address(self._scheme, rest, address)

    def base_url(self) -> str:
        """``http://HOST:PORT``; blocks for the DNS if no port was given."""
        if self._port is not None:
            return f"{self._scheme}://{self._host}:{self._port}"
        host, port = (None if _is_literal(self._host) else self._lookup(self._host)) or (self._host, DEFAULT_PORT)
        return f"{self._scheme}://{host}:{port}"

    def url(self, image_id: str, source: str) -> str:
        """Where to fetch an image: its source if absolute, else relative to the server; without one the server's own path."""
        check_source(source)
        if urlsplit(source).scheme:
            return source
        return urljoin(f"{self.base_url()}/", source or f"images/{image_id}/download")

    def headers_for(self, url: str) -> dict[str, str]:
        """Headers for a request: the token goes to this server only."""
        if not self._token or not url.startswith(f"{self.base_url()}/"):
            return {}
        return {"Authorization": f"Bearer {self._token}"}


def _split_address(scheme: str, rest: str, whole: str) -> tuple[str, int | None]:
    try:
        parts = urlsplit(f"{scheme}://{rest.rstrip('/')}")
        host, port = parts.hostname, parts.port
    except ValueError as err:
        raise InvalidArgumentError(f"not the address of an image service: {whole!r}") from err
    if not host or not _HOST.match(host) or parts.path or parts.query or parts.username:
        raise InvalidArgumentError(f"the image service must be HOST, HOST:PORT or an http URL: {whole!r}")
    return (f"[{host}]" if ":" in host else host), port


def check_source(source: str) -> str:
    """A source as it may stand in a request; InvalidArgumentError for other schemes and malformed ones."""
    if len(source) > SOURCE_MAX_CHARS or any(char <= " " or char == "\x7f" for char in source):
        raise InvalidArgumentError("not a valid source: too long, or spaces or control characters in it")
    try:
        parts = urlsplit(source)
        usable = parts.scheme in {"", "http", "https"} and parts.port != 0
    except ValueError as err:
        raise InvalidArgumentError(f"not a valid source: {source[:200]!r}") from err
    if not usable or (parts.scheme and not parts.hostname) or (not parts.scheme and parts.netloc):
        raise InvalidArgumentError(
            f"not a valid source (want an http URL or a path on the image server): {source[:200]!r}"
        )
    return source
