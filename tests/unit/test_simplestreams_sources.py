"""Documents over HTTP: what a server's answers become."""

from __future__ import annotations

import gzip
import http.server
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from imaging.errors import BadDataError, MistifyError, NotFoundError, NotPermittedError, TooLargeError, UnavailableError
from imaging.simplestreams.constraint import ImageConstraint
from imaging.simplestreams.reader import Lookup, fetch
from imaging.simplestreams.signing import Verifier
from imaging.simplestreams.sources import FileSource, HttpSource
from tests.simplestreams.catalogues import ENDPOINT, key, signed, tree

WANTED = ImageConstraint("us-east-1", ENDPOINT, ["precise"], ["amd64"])


class _Handler(http.server.BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        path = self.path.lstrip("/")
        self.server.requests.append(path)
        statuses = self.server.statuses.get(path, [])
        status = statuses.pop(0) if statuses else 200
        data = self.server.documents.get(path)
        if status != 200 or data is None:
            self.send_error(status if status != 200 else 404)
            return
        self.send_response(200)
        if data.startswith(b"\x1f\x8b"):
            self.send_header("Content-Encoding", "gzip")
        self.send_header("Content-Length", str(len(data) + self.server.missing))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_: Any) -> None:
        return


class Server(http.server.ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self, documents: dict[str, bytes]) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.documents = documents
        self.statuses: dict[str, list[int]] = {}
        self.requests: list[str] = []
        self.missing = 0

    def source(self, **options: Any) -> HttpSource:
        url = f"http://127.0.0.1:{self.server_address[1]}"
        return HttpSource(url, pause=lambda _: None, **options)


@contextmanager
def serving(documents: dict[str, bytes]) -> Iterator[Server]:
    with Server(documents) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join(30)


@pytest.mark.parametrize(
    ("status", "kind", "attempts"),
    [
        (404, NotFoundError, 1),
        (410, NotFoundError, 1),
        (401, NotPermittedError, 1),
        (403, NotPermittedError, 1),
        (500, UnavailableError, 3),
        (503, UnavailableError, 3),
        (418, UnavailableError, 3),
    ],
)
def test_status_is_translated(status: int, kind: type[MistifyError], attempts: int) -> None:
    with serving({}) as server:
        server.statuses["a"] = [status] * 5
        with pytest.raises(kind):
            server.source().fetch("a")
        assert len(server.requests) == attempts


def test_server_that_fails_for_a_moment_is_asked_again() -> None:
    with serving({"a": b"text"}) as server:
        server.statuses["a"] = [503, 500]
        assert server.source().fetch("a").data == b"text"


def test_document_that_is_cut_short_is_not_used() -> None:
    with serving({"a": b"text"}) as server:
        server.missing = 10
        with pytest.raises(UnavailableError):
            server.source().fetch("a")


def test_document_that_unpacks_beyond_the_limit_is_refused() -> None:
    with serving({"a": gzip.compress(bytes(10 << 20))}) as server:
        with pytest.raises(TooLargeError):
            server.source(document_max_bytes=5 << 20).fetch("a")
        assert len(server.source().fetch("a").data) == 10 << 20


def test_file_beyond_the_limit_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(bytes(100))
    with pytest.raises(TooLargeError):
        FileSource(tmp_path, document_max_bytes=99).fetch("a")
    with pytest.raises(BadDataError, match="leaves its tree"):
        FileSource(tmp_path).fetch("../a")


def test_nobody_there_is_not_found_at_once() -> None:
    with serving({}) as server:
        source = server.source()
    with pytest.raises(NotFoundError):
        source.fetch("a")


@pytest.mark.parametrize("status", [401, 404, 500])
def test_lookup_tells_nothing_apart_that_old_clients_could_not(status: int) -> None:
    with serving(tree()) as server:
        server.statuses["streams/v1/index.json"] = [status] * 9
        source = server.source()
        with pytest.raises(NotFoundError) as caught:
            fetch([source], WANTED)
        assert caught.value.message == f'invalid URL "{source.url("streams/v1/index.json")}" not found'


@pytest.mark.parametrize(("status", "falls_back"), [(404, True), (401, True), (500, False)])
def test_server_that_fails_has_not_said_that_nothing_is_signed(status: int, *, falls_back: bool) -> None:
    with serving(signed(tree())) as server:
        server.statuses["streams/v1/index.sjson"] = [status] * 9
        lookup = Lookup(verifier=Verifier(key().public))
        if falls_back:
            _, info = fetch([server.source()], WANTED, lookup)
            assert info is not None
            assert not info.signed
        else:
            with pytest.raises(NotFoundError, match=r"index\.sjson"):
                fetch([server.source()], WANTED, lookup)
