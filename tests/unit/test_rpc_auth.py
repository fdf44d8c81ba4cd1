from __future__ import annotations

import socket
from pathlib import Path

import pytest

from imaging.errors import InvalidArgumentError, NotFoundError
from rpc.auth import TOKEN_MAX_BYTES, HostCheck, TokenCheck, check_binding, is_loopback, load_token


@pytest.mark.parametrize("address", ["127.0.0.1", "127.8.8.8", "::1", "[::1]", "localhost"])
def test_check_binding_of_loopback_needs_nothing(address: str) -> None:
    assert is_loopback(address)
    check_binding(address, has_token=False, insecure=False)


@pytest.mark.parametrize("address", ["0.0.0.0", "::", "192.0.2.1", "host.example", ""])
def test_check_binding_of_another_address_names_both_ways_out(address: str) -> None:
    with pytest.raises(InvalidArgumentError, match=r"--token-file.*--insecure"):
        check_binding(address, has_token=False, insecure=False)
    check_binding(address, has_token=True, insecure=False)
    check_binding(address, has_token=False, insecure=True)


def test_load_token_takes_the_word_without_blanks(tmp_path: Path) -> None:
    path = tmp_path / "token"
    path.write_text(" s3cret\n")
    assert load_token(path) == "s3cret"


@pytest.mark.parametrize(
    "content", [b"", b"\n", b"two words", "schlüssel".encode(), b"x" * (TOKEN_MAX_BYTES + 1), b"a\nb"]
)
def test_load_token_of_no_single_word_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "token"
    path.write_bytes(content)
    with pytest.raises(InvalidArgumentError, match="token file"):
        load_token(path)


def test_load_token_of_missing_file_names_it(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError, match="nowhere"):
        load_token(tmp_path / "nowhere")


@pytest.mark.parametrize("header", ["Bearer s3cret", "bearer s3cret", "BEARER  s3cret "])
def test_token_check_of_the_token_passes(header: str) -> None:
    assert TokenCheck("s3cret").passes(header)


@pytest.mark.parametrize(
    "header", ["", "Bearer", "Bearer ", "Bearer s3cre", "Bearer s3cretx", "Basic s3cret", "s3cret", "Bearer \udcff"]
)
def test_token_check_of_anything_else_refuses(header: str) -> None:
    assert not TokenCheck("s3cret").passes(header)


def test_token_check_without_token_passes_everybody() -> None:
    assert TokenCheck(None).passes("")


@pytest.mark.parametrize(
    "host",
    ["localhost", "LOCALHOST:1", "localhost.", "127.0.0.1:19999", "[::1]:19999", "[::1]", "[0:0::1]", "agent.fleet:80"],
)
def test_host_check_of_own_names_passes(host: str) -> None:
    check = HostCheck("127.0.0.1", ["Agent.Fleet"])
    assert check.passes(host)
    assert check.passes(host), "the second look, from memory"


@pytest.mark.parametrize(
    "host",
    [
        "evil.example",
        "evil.example:19999",
        "localhost.evil.example",
        "192.0.2.1",
        "",
        "127.0.0.1.nip.io",
        "[::2]",
        "a:b:c",
    ],
)
def test_host_check_of_foreign_names_refuses(host: str) -> None:
    assert not HostCheck("127.0.0.1").passes(host)


@pytest.mark.parametrize("address", ["0.0.0.0", "::"])
def test_host_check_bound_to_every_address_takes_numbers_and_the_own_name_only(address: str) -> None:
    check = HostCheck(address)
    assert check.passes("192.0.2.1:80")
    assert check.passes("[2001:db8::1]:80")
    assert check.passes(socket.gethostname())
    assert not check.passes("evil.example")


def test_host_check_bound_to_one_address_takes_that_one() -> None:
    check = HostCheck("192.0.2.7")
    assert check.passes("192.0.2.7:80")
    assert not check.passes("192.0.2.8:80")
