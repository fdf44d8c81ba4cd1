"""Where the service may fetch from: a policy on schemes, hosts and addresses. Pure but for the resolver it is given.

What it guards against: a caller who makes the service fetch what only the service can reach (its own loopback, the machine's network,
a cloud's metadata address), by name, by redirect, by a name that changes its address, or by an address written so that it does not
look like one (decimal, octal, IPv6-mapped).

* Only http and https (``file`` is never fetched).
* Every address a host resolves to is checked, at every hop. One refused address refuses the host: a name with a public and a
  private address is how rebinding looks.
* The connection is made to an address that was checked, never to the name again; and the socket's address is checked
  once more when the socket is made, whatever path led there.
"""

from __future__ import annotations

import ipaddress
import socket
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from aiohttp.abc import AbstractResolver, ResolveResult
from yarl import URL

from imaging.errors import InvalidArgumentError, NotPermittedError

Address = ipaddress.IPv4Address | ipaddress.IPv6Address
Network = ipaddress.IPv4Network | ipaddress.IPv6Network

SCHEMES = frozenset({"http", "https"})

_NAT64 = ipaddress.IPv6Network("64:ff9b::/96")
"""An IPv4 address in the last 32 bits, translated on the way: as public as that address is."""

_LOCAL = tuple(
    ipaddress.ip_network(text)
    for text in ("192.0.0.0/24", "192.88.99.0/24", "64:ff9b:1::/48", "2001::/23", "3fff::/20", "5f00::/16", "fec0::/10")
)
"""Not public by IANA's registries, whatever version of :mod:`ipaddress` is asked."""


def _embedded(address: Address) -> Address:
    """The IPv4 address inside an IPv6 one that stands for it, else the address itself."""
    if isinstance(address, ipaddress.IPv4Address):
        return address
    inner = address.ipv4_mapped or address.sixtofour
    if inner is None and address in _NAT64:
        inner = ipaddress.IPv4Address(int(address) & 0xFFFF_FFFF)
    if inner is None and int(address) >> 32 == 0 and int(address) > 1:
        inner = ipaddress.IPv4Address(int(address))  # ::a.b.c.d, the old "compatible" form
    return inner or address


@dataclass(frozen=True, slots=True)
class SourcePolicy:
    """What may be fetched. ``networks`` are allowed besides public addresses; ``private`` allows everything."""

    networks: tuple[Network, ...] = ()
    private: bool = False

    @classmethod
    def parse(cls, networks: Sequence[str], *, private: bool = False) -> SourcePolicy:
        """From CIDR texts; InvalidArgumentError names one that is none."""
        try:
            return cls(tuple(ipaddress.ip_network(text) for text in networks), private)
        except ValueError as err:
            raise InvalidArgumentError(f"not a network in CIDR form: {err}") from err

    def check_url(self, text: str) -> URL:
        """The URL, if its form may be fetched at all; InvalidArgumentError (form) or NotPermittedError (scheme)."""
        try:
            url = URL(text)
            host = url.host
            usable_port = url.port != 0
        except ValueError as err:
            raise InvalidArgumentError(f"invalid image source: {text[:200]!r} is not a URL") from err
        if url.scheme not in SCHEMES:
            raise InvalidArgumentError(f"invalid image source: scheme {url.scheme[:32]!r} is not http or https")
        if not host or not usable_port:
            raise InvalidArgumentError("invalid image source: no host")
        return url

    def allows(self, address: str) -> bool:
        """Whether the service may connect to that address."""
        try:
            real = _embedded(ipaddress.ip_address(address.partition("%")[0]))
        except ValueError:
            return False
        if any(real.version == network.version and real in network for network in self.networks):
            return True
        if real.is_multicast or real.is_unspecified:
            return False
        return self.private or (
            real.is_global and not any(real.version == local.version and real in local for local in _LOCAL)
        )

    def check_address(self, host: str, address: str) -> None:
        """NotPermittedError if ``host`` leads to an address that may not be fetched from."""
        if not self.allows(address):
            raise NotPermittedError(f"image source {host} is at {address}, a network this service does not fetch from")


class GuardedResolver(AbstractResolver):
    """A resolver that hands out only addresses the policy allows, or none at all."""

    def __init__(self, policy: SourcePolicy, inner: AbstractResolver) -> None:
        self._policy = policy
        self._inner = inner

    async def resolve(
        self, host: str, port: int = 0, family: socket.AddressFamily = socket.AF_UNSPEC
    ) -> list[ResolveResult]:
        """Resolve once and check everything that came back."""
        found = await self._inner.resolve(host, port, family)
        for result in found:
            self._policy.check_address(host, result["host"])
        return found

    async def close(self) -> None:
        """Release the inner resolver."""
        await self._inner.close()


def guarded_socket(policy: SourcePolicy) -> Callable[[tuple[Any, ...]], socket.socket]:
    """A socket factory for aiohttp's connector: the last check, on the very address that is connected to."""

    def make(info: tuple[Any, ...]) -> socket.socket:
        family, kind, protocol, _, address = info
        policy.check_address(str(address[0]), str(address[0]))
        made = socket.socket(family, kind, protocol)
        made.setblocking(False)
        return made

    return make
