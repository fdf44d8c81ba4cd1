"""A running agent against callers and servers that mean no good: a clear answer, nothing done, nothing in the log that is not its fault."""

from __future__ import annotations

import gzip
import json
import random
import resource
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.acceptance.daemons import Agent, new_agent, start_agent
from tests.fakes.agent_world import disk
from tests.fakes.image_server import FakeImageServer
from tests.waiting import wait_until

LIST = b'{"method":"ImageStore.ListImages","params":[{}],"id":1}'

MEMORY_MAX_BYTES = 150 << 20
"""What each daemon is promised to stay below."""


@pytest.fixture(autouse=True)
def _unharmed(agent: Agent) -> Iterator[None]:
    """Whatever was tried, the agent serves, has what it had, and takes nothing for a fault of its own."""
    before, volumes = len(agent.log()), agent.call("ListVolumes")
    yield
    assert agent.is_ready()
    assert agent.call("ListVolumes") == volumes
    told = agent.log()[before:]
    assert "Traceback" not in told
    assert " ERROR " not in told
    assert agent.metric("process_resident_memory_bytes") < MEMORY_MAX_BYTES


def exchange(agent: Agent, request: bytes) -> bytes:
    """What comes back for these very bytes, up to the end of the connection."""
    with socket.create_connection(("127.0.0.1", agent.port), timeout=60) as client:
        client.sendall(request)
        return b"".join(iter(lambda: client.recv(65536), b""))


def request(
    body: bytes = LIST, *, line: str = "POST /_mistify_RPC_", host: str = "127.0.0.1", fields: str = ""
) -> bytes:
    head = f"{line} HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\nContent-Type: application/json\r\n{fields}"
    return head.encode() + b"Content-Length: %d\r\n\r\n" % len(body) + body


def method(name: str, **arguments: Any) -> bytes:
    return json.dumps({"method": f"ImageStore.{name}", "params": [arguments], "id": 1}).encode()


def status(answer: bytes) -> int:
    return int(answer.split(b" ", 2)[1])


# -- JSON ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "body",
    [
        b'{"method":"ImageStore.ListImages","params":' + b"[" * 5000 + b"]" * 5000 + b',"id":1}',
        b'{"method":"ImageStore.ListImages","params":[{"a":' + b'{"a":' * 3000 + b"1" + b"}" * 3001 + b"]}",
        b'{"method":"ImageStore.CreateVolume","params":[{"id":"a","size":' + b"9" * 5000 + b'}],"id":1}',
        b'{"method":"ImageStore.CreateVolume","params":[{"id":"a","size":1e400}],"id":1}',
        b'{"method":"ImageStore.CreateVolume","params":[{"id":"a","size":9223372036854775808}],"id":1}',
        b'{"method":"ImageStore.CreateVolume","params":[{"id":"a","size":8796093022208}],"id":1}',
        b'{"method":"ImageStore.CreateVolume","params":[{"id":"a","size":1.5}],"id":1}',
        b'{"method":"ImageStore.CreateVolume","params":[{"id":"a","size":true}],"id":1}',
        rb'{"method":"ImageStore.GetImage","params":[{"id":"\ud800"}],"id":1}',
        b'{"method":"ImageStore.ListImages","params":[{}],"id":NaN}',
        b"\xef\xbb\xbf" + LIST,
        LIST.decode().encode("utf-16"),
        gzip.compress(LIST),
    ],
    ids=[
        "deep params",
        "deep struct",
        "huge integer",
        "infinite",
        "beyond 64 bits",
        "beyond a volume",
        "fraction",
        "boolean",
        "half a character",
        "NaN",
        "byte order mark",
        "UTF-16",
        "packed",
    ],
)
def test_json_that_means_nothing_is_400_in_words(agent: Agent, body: bytes) -> None:
    answer = exchange(agent, request(body))
    assert status(answer) == 400
    assert answer.partition(b"\r\n\r\n")[2]


def test_deep_array_and_too_many_calls_are_one_error_each(agent: Agent) -> None:
    call = b'{"jsonrpc":"2.0","method":"ImageStore.ListImages","id":1}'
    for body, words in ((b"[" * 100_000, b"max depth"), (b"[" + b",".join([call] * 5000) + b"]", b"more than 100")):
        answer = json.loads(exchange(agent, request(body)).partition(b"\r\n\r\n")[2])
        assert words.decode() in answer["error"]["data"]["detail"]


def test_key_given_twice_means_its_last_value(agent: Agent) -> None:
    body = b'{"method":"ImageStore.GetImage","method":"ImageStore.ListImages","params":[{"id":"z"}],"id":1,"id":2}'
    answer = exchange(agent, request(body))
    assert answer.endswith(b'{"result":{"images":[]},"error":null,"id":2}\n')


def test_any_bytes_are_answered(agent: Agent) -> None:
    """Random changes of a good call: some are calls still, none is more than an error."""
    seed = random.randrange(1 << 32)
    rng = random.Random(seed)
    for _ in range(200):
        body = bytearray(method("GetImage", id="x"))
        for _ in range(rng.randrange(1, 6)):
            body[rng.randrange(len(body))] = rng.randrange(256)
        answer = exchange(agent, request(bytes(body)))
        assert status(answer) in {200, 400}, f"seed {seed}: {bytes(body)!r} gave {answer!r}"


# -- HTTP ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("verb", ["HEAD", "TRACE", "PROPFIND", "OPTIONS"])
def test_verb_that_http_knows_is_405(agent: Agent, verb: str) -> None:
    answer = exchange(agent, request(line=f"{verb} /_mistify_RPC_"))
    assert status(answer) == 405
    assert verb == "HEAD" or answer.endswith(f"rpc: POST method required, received {verb}".encode())


@pytest.mark.parametrize("verb", ["FOO", "get", "P\u00d6ST"])
def test_verb_that_http_does_not_know_is_400_and_says_so(agent: Agent, verb: str) -> None:
    """It never gets as far as the endpoint, which would have said 405."""
    answer = exchange(agent, request(line=f"{verb} /_mistify_RPC_"))
    assert status(answer) == 400
    assert b"nvalid method" in answer or b"nvalid char" in answer


@pytest.mark.parametrize(
    "sent",
    [
        request(fields="Content-Length: 5\r\n"),
        request(fields="Transfer-Encoding: chunked\r\n"),
        request(fields="Host: evil.example\r\n"),
        request(fields="X-Long: " + "x" * 100_000 + "\r\n"),
        request(fields="".join(f"X-{number}: x\r\n" for number in range(20_000))),
        request(line="POST /" + "x" * 100_000),
        request(line="POST /_mistify_RPC_\0"),
        b"POST /_mistify_RPC_ HTTP/1.1\r\nContent-Length: 0\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + b"x" * 500,
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    ],
    ids=[
        "two lengths",
        "length and chunks",
        "two hosts",
        "long header",
        "many headers",
        "long path",
        "nul",
        "no host",
        "TLS",
        "HTTP/2",
    ],
)
def test_request_that_is_no_http_is_400(agent: Agent, sent: bytes) -> None:
    try:
        answer = exchange(agent, sent)
    except ConnectionError:
        return  # it was closed while we still sent: nothing was taken for a request
    assert status(answer) == 400


def test_caller_who_hangs_up_in_its_body_is_not_our_fault(agent: Agent) -> None:
    def ended() -> float:
        return agent.metric("mistify_http_requests_total", route="/_mistify_RPC_", status="400")

    before = ended()
    with socket.create_connection(("127.0.0.1", agent.port), timeout=60) as client:
        client.sendall(request(LIST)[:-5])
    wait_until(lambda: ended() == before + 1, "the request to be given up")


def test_body_of_broken_chunks_is_400(agent: Agent) -> None:
    head = b"POST /_mistify_RPC_ HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\nConnection: close\r\n"
    answer = exchange(agent, head + b"Transfer-Encoding: chunked\r\n\r\n5\r\n{abcd\r\nzz\r\n")
    assert status(answer) == 400


def test_packed_body_is_not_unpacked(agent: Agent) -> None:
    """So no bomb can go off: what is announced as gzip is JSON or it is nothing."""
    bomb = gzip.compress(b" " * (64 << 20) + LIST)
    answer = exchange(agent, request(bomb, fields="Content-Encoding: gzip\r\n"))
    assert status(answer) == 400


# -- names -----------------------------------------------------------------------------------------------------------

WRONG_NAMES = ["..", "../x", "a/../b", "/abs", "-rf", "a,b", "a%b", "a b", ".", "a//b", "a/", "a\0b", "x" * 300]


@pytest.mark.parametrize("name", [*WRONG_NAMES, "mistify/images/.."])
def test_download_of_a_name_that_leaves_its_place_is_400(agent: Agent, name: str) -> None:
    answer = exchange(agent, request(json.dumps({"id": f"{name}@s"}).encode(), line="GET /snapshots/download"))
    assert (status(answer), answer.endswith(b"not a valid dataset\n")) == (400, True)


@pytest.mark.parametrize(
    "query", ["id=..%2f..%2fetc%2fpasswd@s", "id=a@s%00", "id=%ff@s", "id=%ZZ", "id=a@s&resume_token=%00"]
)
def test_download_query_that_is_a_trick_finds_nothing(agent: Agent, query: str) -> None:
    answer = exchange(agent, request(b"", line=f"GET /snapshots/download?{query}"))
    assert status(answer) in {400, 404}


# -- image servers that lie ------------------------------------------------------------------------------------------


def test_server_without_an_end_stops_at_the_limit(tmp_path: Path, image_server: FakeImageServer) -> None:
    """A large disk of zeros in few bytes, and these packed again."""
    bomb = gzip.compress(bytes(256 << 20))
    image_server.serve("bomb", bomb)
    image_server.serve("bomb-in-a-bomb", gzip.compress(bomb))
    state_dir = tmp_path / "state"
    with start_agent(state_dir, image_service=image_server.address, max_image_bytes=8 << 20) as agent:
        assert "larger than 8388608 bytes" in agent.error("RequestImage", id="bomb")
        assert agent.call("RequestImage", id="bomb-in-a-bomb")["images"][0]["size"] <= 2
        agent.call("DeleteImage", id="bomb-in-a-bomb")
        assert agent.metric("process_resident_memory_bytes") < MEMORY_MAX_BYTES
        assert list((state_dir / "fetching").iterdir()) == []


@pytest.mark.parametrize(
    "target", ["file:///etc/passwd", "ftp://127.0.0.1/x", "gopher://127.0.0.1:1/", "//", "http://["]
)
def test_redirect_to_what_is_no_http_is_refused(agent: Agent, image_server: FakeImageServer, target: str) -> None:
    image_server.serve("redirected", redirect=target)
    assert "redirected" in agent.error("RequestImage", id="redirected")


# -- the machine -----------------------------------------------------------------------------------------------------


def test_state_directory_that_is_a_file_is_one_clear_line(tmp_path: Path) -> None:
    (tmp_path / "state").write_text("a file")
    agent = new_agent(tmp_path / "state")
    agent.start(wait=False)
    assert agent.process is not None
    assert agent.process.wait(60) == 2
    assert f"'{tmp_path / 'state'}' is a file" in agent.log()
    assert "Traceback" not in agent.log()


def test_write_that_fails_is_an_error_and_leaves_nothing(tmp_path: Path, image_server: FakeImageServer) -> None:
    """No file may grow beyond some megabytes: what a full disk is to the program that writes to it."""
    image_server.serve("large", disk(1, 64 << 20))
    image_server.serve("small", disk(2))
    with start_agent(tmp_path / "state", image_service=image_server.address) as agent:
        resource.prlimit(agent.pid, resource.RLIMIT_FSIZE, (16 << 20, resource.RLIM_INFINITY))
        text = agent.error("RequestImage", id="large")
        assert "Traceback" not in text
        assert agent.error("GetImage", id="large") == "not found"
        assert agent.call("RequestImage", id="small")["images"][0]["status"] == "complete"
        assert agent.is_ready()
        sizes = [path.stat().st_size for path in (tmp_path / "state").rglob("*") if path.is_file()]
        assert max(sizes) <= 16 << 20
        assert list((tmp_path / "state" / "fetching").iterdir()) == []
