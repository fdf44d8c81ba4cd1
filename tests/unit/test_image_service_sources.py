"""Where the service may fetch from, with a resolver at the border that answers what the test wants."""

from __future__ import annotations

import socket
from collections.abc import AsyncIterator, Iterator

import pytest
from aiohttp.abc import AbstractResolver, ResolveResult

from image_service.fetcher import ConversationLimits, Fetcher, show, validator_of
from image_service.sources import SourcePolicy, guarded_socket
from imaging.errors import InvalidArgumentError, MistifyError, NotPermittedError, UnavailableError
from tests.fakes.source_server import Source, SourceServer, start_source_server

DATA = b"content" * 1000

PUBLIC = ["1.1.1.1", "8.8.8.8", "2606:4700::1111", "::ffff:8.8.8.8", "64:ff9b::808:808", "2002:808:808::"]
PRIVATE = [
    "127.0.0.1",
    "127.255.255.254",
    "10.1.2.3",
    "172.31.255.255",
    "192.168.0.1",
    "100.64.1.1",
    "169.254.169.254",
    "0.0.0.0",
    "255.255.255.255",
    "224.0.0.1",
    "192.0.2.1",
    "198.18.0.1",
    "::1",
    "::",
    "fe80::1",
    "fe80::1%eth0",
    "fd00:ec2::254",
    "fc00::1",
    "ff02::1",
    "::ffff:127.0.0.1",
    "::ffff:169.254.169.254",
    "::127.0.0.1",
    "64:ff9b::7f00:1",
    "64:ff9b:1::7f00:1",
    "2002:7f00:1::",
    "2001:db8::1",
    "2001:0:7f00:1::",
    "fec0::1",
    "3fff::1",
    "192.0.0.1",
    "not an address",
    "127.1",
    "",
]


@pytest.mark.parametrize("address", PUBLIC)
def test_public_address_is_allowed(address: str) -> None:
    assert SourcePolicy().allows(address)


@pytest.mark.parametrize("address", PRIVATE)
def test_private_address_in_any_form_is_refused(address: str) -> None:
    assert not SourcePolicy().allows(address)
    with pytest.raises(NotPermittedError, match="does not fetch from"):
        SourcePolicy().check_address("host", address)


def test_allowed_network_opens_that_network_only() -> None:
    policy = SourcePolicy.parse(["127.0.0.0/8", "fd00::/16"])
    assert [policy.allows(one) for one in ("127.9.9.9", "::ffff:127.0.0.1", "fd00::5")] == [True] * 3
    assert [policy.allows(one) for one in ("10.0.0.1", "::1", "fd01::5", "169.254.169.254")] == [False] * 4


def test_all_private_sources_still_excludes_what_is_no_host() -> None:
    policy = SourcePolicy.parse([], private=True)
    assert [policy.allows(one) for one in ("127.0.0.1", "10.0.0.1", "::1", "169.254.169.254")] == [True] * 4
    assert [policy.allows(one) for one in ("0.0.0.0", "224.0.0.1", "::", "junk")] == [False] * 4


@pytest.mark.parametrize("text", ["127.0.0.1/8", "x", "1.2.3.4/33"])
def test_network_that_is_none_is_refused(text: str) -> None:
    with pytest.raises(InvalidArgumentError, match="CIDR"):
        SourcePolicy.parse([text])


@pytest.mark.parametrize(
    "text",
    [
        "",
        "x",
        "/path",
        "ftp://h/",
        "file:///etc/passwd",
        "http://",
        "http:///p",
        "http://[::1",
        "http://h:99999/",
        "http://h:0/",
    ],
)
def test_url_that_can_not_be_fetched_is_refused(text: str) -> None:
    with pytest.raises(InvalidArgumentError, match="invalid image source"):
        SourcePolicy().check_url(text)


def test_socket_is_checked_on_the_address_it_connects_to() -> None:
    make = guarded_socket(SourcePolicy())
    with pytest.raises(NotPermittedError):
        make((socket.AF_INET, socket.SOCK_STREAM, 6, "", ("127.0.0.1", 80)))
    make((socket.AF_INET, socket.SOCK_STREAM, 6, "", ("1.1.1.1", 80))).close()


# -- conversations -------------------------------------------------------------------------------------------------------


class _Resolver(AbstractResolver):
    """Answers the next list of addresses each time it is asked."""

    def __init__(self, *answers: list[str]) -> None:
        self.answers = list(answers)
        self.asked: list[str] = []

    async def resolve(
        self, host: str, port: int = 0, family: socket.AddressFamily = socket.AF_INET
    ) -> list[ResolveResult]:
        self.asked.append(host)
        addresses = self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]
        return [
            ResolveResult(hostname=host, host=one, port=port, family=socket.AF_INET, proto=0, flags=0)
            for one in addresses
        ]

    async def close(self) -> None:
        self.answers.clear()


@pytest.fixture(scope="module")
def server() -> Iterator[SourceServer]:
    with start_source_server() as running:
        running.add("/file", Source(DATA))
        yield running


async def _read(fetcher: Fetcher, url: str) -> bytes:
    async with fetcher.open(url) as body:
        return b"".join([chunk async for chunk in body.chunks()])


@pytest.fixture
async def loopback() -> AsyncIterator[Fetcher]:
    fetcher = Fetcher(SourcePolicy.parse(["127.0.0.1/32"]), ConversationLimits())
    yield fetcher
    await fetcher.close()


async def _with_resolver(resolver: _Resolver, url: str, policy: SourcePolicy) -> bytes:
    fetcher = Fetcher(policy, ConversationLimits(connect_timeout_s=5), resolver=resolver)
    try:
        return await _read(fetcher, url)
    finally:
        await fetcher.close()


async def test_name_that_leads_to_an_allowed_address_is_fetched(server: SourceServer) -> None:
    url = f"http://images.example:{server.server_address[1]}/file"
    resolver = _Resolver(["127.0.0.1"])
    assert await _with_resolver(resolver, url, SourcePolicy.parse(["127.0.0.1/32"])) == DATA
    assert resolver.asked == ["images.example"]


async def test_name_with_one_refused_address_is_refused_whole(server: SourceServer) -> None:
    url = f"http://images.example:{server.server_address[1]}/file"
    for answer in (["127.0.0.1", "10.0.0.1"], ["10.0.0.1", "127.0.0.1"]):
        with pytest.raises(NotPermittedError, match=r"10\.0\.0\.1"):
            await _with_resolver(_Resolver(answer), url, SourcePolicy.parse(["127.0.0.1/32"]))


async def test_name_that_changes_after_the_check_is_not_asked_again(server: SourceServer) -> None:
    """The address that was checked is the one connected to: a second answer would be the forbidden one."""
    url = f"http://rebinding.example:{server.server_address[1]}/file"
    resolver = _Resolver(["127.0.0.1"], ["10.0.0.1"])
    assert await _with_resolver(resolver, url, SourcePolicy.parse(["127.0.0.1/32"])) == DATA
    assert len(resolver.asked) == 1


async def test_name_that_changes_between_two_hops_is_checked_again(server: SourceServer) -> None:
    port = server.server_address[1]
    server.add("/again", Source(status=302, location=f"http://rebinding.example:{port}/file"))
    resolver = _Resolver(["127.0.0.1"], ["169.254.169.254"])
    with pytest.raises(NotPermittedError, match=r"169\.254\.169\.254"):
        await _with_resolver(resolver, f"http://rebinding.example:{port}/again", SourcePolicy.parse(["127.0.0.1/32"]))


async def test_name_that_does_not_resolve_is_unavailable() -> None:
    class Nowhere(_Resolver):
        async def resolve(
            self, host: str, port: int = 0, family: socket.AddressFamily = socket.AF_INET
        ) -> list[ResolveResult]:
            raise OSError(f"no such host: {host}")

    with pytest.raises(UnavailableError, match="does not answer"):
        await _with_resolver(Nowhere(), "http://images.example/x", SourcePolicy())


async def test_body_that_breaks_gives_what_came_and_then_raises_ours(server: SourceServer, loopback: Fetcher) -> None:
    url = server.add("/breaks", Source(DATA, break_after=[1000]))
    got: list[bytes] = []

    async def take() -> None:
        async with loopback.open(url) as body:
            async for chunk in body.chunks():
                got.append(chunk)  # noqa: PERF401 - what came before the error counts

    with pytest.raises(UnavailableError, match="broke"):
        await take()
    assert b"".join(got) == DATA[:1000]


async def test_range_is_asked_only_with_a_proof(server: SourceServer, loopback: Fetcher) -> None:
    source = Source(DATA)
    url = server.add("/proof", source)
    async with loopback.open(url, offset_bytes=100) as body:
        assert body.offset_bytes == 0
    async with loopback.open(url, offset_bytes=100, validator=str(source.tag), total_bytes=len(DATA)) as body:
        assert (body.offset_bytes, body.total_bytes) == (100, len(DATA))
        assert b"".join([chunk async for chunk in body.chunks()]) == DATA[100:]
    async with loopback.open(url, offset_bytes=100, validator='"old"', total_bytes=len(DATA)) as body:
        assert body.offset_bytes == 0
    assert [headers.get("Range") for headers in source.requests] == [None, "bytes=100-", "bytes=100-"]


@pytest.mark.parametrize("offset", [len(DATA), len(DATA) + 5])
async def test_offset_the_source_can_not_serve_starts_from_zero(
    server: SourceServer, loopback: Fetcher, offset: int
) -> None:
    source = Source(DATA)
    url = server.add("/beyond", source)
    async with loopback.open(url, offset_bytes=offset, validator=str(source.tag)) as body:
        assert (body.offset_bytes, body.total_bytes) == (0, len(DATA))


async def test_length_that_is_another_than_known_starts_from_zero(server: SourceServer, loopback: Fetcher) -> None:
    source = Source(DATA)
    url = server.add("/other-length", source)
    async with loopback.open(url, offset_bytes=5, validator=str(source.tag), total_bytes=len(DATA) + 1) as body:
        assert body.offset_bytes == 0


async def test_every_conversation_ends_in_our_errors(server: SourceServer, loopback: Fetcher) -> None:
    for status in (*range(201, 206), *range(300, 310), *range(400, 452), *range(500, 512)):
        with pytest.raises(MistifyError):
            await _read(loopback, server.add("/status", Source(status=status)))


@pytest.mark.parametrize(
    ("headers", "validator"),
    [
        ({"ETag": '"strong"'}, '"strong"'),
        ({"ETag": 'W/"weak"'}, ""),
        ({"ETag": "bare"}, ""),
        ({}, ""),
        ({"Last-Modified": "Sat, 01 Jan 2000 00:00:00 GMT"}, ""),
        (
            {"Last-Modified": "Sat, 01 Jan 2000 00:00:00 GMT", "Date": "Sat, 01 Jan 2000 00:00:01 GMT"},
            "Sat, 01 Jan 2000 00:00:00 GMT",
        ),
        ({"Last-Modified": "Sat, 01 Jan 2000 00:00:00 GMT", "Date": "Sat, 01 Jan 2000 00:00:00 GMT"}, ""),
        ({"Last-Modified": "nonsense", "Date": "Sat, 01 Jan 2000 00:00:00 GMT"}, ""),
    ],
)
def test_validator_is_what_identifies_the_bytes(headers: dict[str, str], validator: str) -> None:
    assert validator_of(headers) == validator


def test_shown_url_has_no_secrets() -> None:
    url = SourcePolicy().check_url("http://user:secret@host:81/path?signature=secret#secret")
    assert show(url) == "http://host:81/path"
