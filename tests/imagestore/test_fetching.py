"""Fetching from URLs: when nobody is asked, what is asked, and how a broken download goes on."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, ClassVar

import pytest

from image_service.imagestore.fetching import Downloader, PullPolicy, parse_max_age, use_cached
from image_service.imagestore.steps import chain
from image_service.imagestore.store import ImageStore
from imaging.errors import BadDataError, InvalidArgumentError, MistifyError, NotFoundError, UnavailableError
from tests.imagestore.conftest import Clock
from tests.imagestore.images import aci, key_of, put, read

IMAGE = aci(content=bytes(range(256)) * 4000)


class Source(ThreadingHTTPServer):
    """A web server whose tests say how it behaves; it keeps what it was asked."""

    daemon_threads = True
    data: bytes = IMAGE
    etag: str = '"one"'
    max_age: str = ""
    status: int = 0
    cut_after: int = 0
    ranges: str = "honest"

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.asked: list[dict[str, str]] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/app.aci"


class _Handler(BaseHTTPRequestHandler):
    server: Source
    protocol_version = "HTTP/1.1"
    default_headers: ClassVar[dict[str, str]] = {}

    def log_message(self, *_: Any) -> None:
        """Quiet."""

    def do_GET(self) -> None:
        source = self.server
        source.asked.append(
            {name: value for name, value in self.headers.items() if name in {"Range", "If-Range", "If-None-Match"}}
        )
        if self.path == "/loop":
            return self._send(302, b"", {"Location": "/loop"})
        if source.status:
            return self._send(source.status, b"")
        if self.headers.get("If-None-Match") == source.etag:
            return self._send(304, None)
        return self._send_data(source)

    def _send_data(self, source: Source) -> None:
        begin = int(self.headers.get("Range", "bytes=0-").removeprefix("bytes=").removesuffix("-"))
        same = self.headers.get("If-Range") == source.etag
        if begin >= len(source.data) and same:
            return self._send(416, b"")
        if begin and same and source.ranges == "honest":
            return self._send(
                206, source.data[begin:], {"Content-Range": f"bytes {begin}-{len(source.data) - 1}/{len(source.data)}"}
            )
        if begin and source.ranges == "lying":
            return self._send(206, source.data, {"Content-Range": f"bytes 0-{len(source.data) - 1}/{len(source.data)}"})
        return self._send(200, source.data)

    def _send(self, status: int, body: bytes | None, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        self.send_header("ETag", self.server.etag)
        if self.server.max_age:
            self.send_header("Cache-Control", self.server.max_age)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        if body is not None:
            self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        cut = self.server.cut_after
        self.wfile.write((body or b"")[: cut or None])
        if cut:
            self.server.cut_after = 0
            self.close_connection = True


@pytest.fixture
def source() -> Iterator[Source]:
    with Source() as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.02,))
        thread.start()
        yield server
        server.shutdown()
        thread.join(30)


@pytest.fixture
def downloader(store: ImageStore) -> Iterator[Downloader]:
    made = Downloader(store)
    yield made
    made.close()


def test_fetch_imports_and_records_the_remote(
    source: Source, downloader: Downloader, store: ImageStore, clock: Clock
) -> None:
    source.max_age = "max-age=60"
    assert downloader.fetch(source.url) == key_of(IMAGE)
    assert read(store, key_of(IMAGE)) == IMAGE
    remote = store.get_remote(source.url)
    assert (remote.etag, remote.blob_key, remote.cache_max_age_s) == ('"one"', key_of(IMAGE), 60)
    assert remote.download_time_ns == clock.now_ns
    assert not store.get_aci_info(key_of(IMAGE)).latest
    assert list(store.layout.temporary.iterdir()) == []


def test_fetch_within_max_age_asks_nobody_and_later_revalidates(
    source: Source, downloader: Downloader, store: ImageStore, clock: Clock
) -> None:
    source.max_age = "max-age=60"
    key = downloader.fetch(source.url)
    clock.move(59)
    assert downloader.fetch(source.url) == key
    assert len(source.asked) == 1
    clock.move(2)
    assert downloader.fetch(source.url) == key
    assert source.asked[1] == {"If-None-Match": '"one"'}
    assert store.get_remote(source.url).download_time_ns == clock.now_ns  # 304 renews it
    clock.move(59)
    downloader.fetch(source.url)
    assert len(source.asked) == 2


def test_fetch_of_what_changed_imports_anew(source: Source, downloader: Downloader, store: ImageStore) -> None:
    old = downloader.fetch(source.url)
    source.data, source.etag = aci(content=b"new"), '"two"'
    assert downloader.fetch(source.url) == key_of(source.data) != old
    assert store.get_remote(source.url).etag == '"two"'
    assert store.has_full_key(old)


def test_fetch_with_policy_new_asks_only_if_nothing_is_known(source: Source, downloader: Downloader) -> None:
    with pytest.raises(NotFoundError, match="pull policy is never"):
        downloader.fetch(source.url, policy=PullPolicy.NEVER)
    assert downloader.fetch(source.url, policy=PullPolicy.NEW) == downloader.fetch(source.url, policy=PullPolicy.NEW)
    assert downloader.fetch(source.url, policy=PullPolicy.NEVER) == key_of(IMAGE)
    assert len(source.asked) == 1


def test_fetch_of_an_image_that_was_removed_fetches_again(
    source: Source, downloader: Downloader, store: ImageStore
) -> None:
    source.max_age = "max-age=1000"
    key = downloader.fetch(source.url)
    store.infos.delete(key)
    store.save_remote(_remote(source.url, key))
    assert downloader.fetch(source.url, policy=PullPolicy.NEW) == key
    assert source.asked == [{}, {}]


def _remote(url: str, key: str) -> Any:
    from image_service.imagestore.infos import Remote

    return Remote(url, "", '"one"', key, 1000, 2**62)


@pytest.mark.parametrize("cut", [1, 5000, len(IMAGE) - 1])
def test_fetch_that_broke_asks_only_for_the_rest(source: Source, downloader: Downloader, cut: int) -> None:
    source.cut_after = cut
    with pytest.raises(UnavailableError):
        downloader.fetch(source.url)
    assert downloader.fetch(source.url) == key_of(IMAGE)
    assert source.asked[1] == {"Range": f"bytes={cut}-", "If-Range": '"one"'}


def test_fetch_that_broke_begins_anew_if_the_source_changed(source: Source, downloader: Downloader) -> None:
    source.cut_after = 5000
    with pytest.raises(UnavailableError):
        downloader.fetch(source.url)
    source.data, source.etag = aci(content=b"new"), '"two"'
    assert downloader.fetch(source.url) == key_of(source.data)


def test_fetch_that_broke_takes_a_whole_answer_as_a_new_beginning(source: Source, downloader: Downloader) -> None:
    source.cut_after, source.ranges = 5000, "unknown"
    with pytest.raises(UnavailableError):
        downloader.fetch(source.url)
    assert downloader.fetch(source.url) == key_of(IMAGE)


def test_fetch_that_broke_refuses_another_range_than_asked(source: Source, downloader: Downloader) -> None:
    source.cut_after, source.ranges = 5000, "lying"
    with pytest.raises(UnavailableError):
        downloader.fetch(source.url)
    with pytest.raises(BadDataError, match="another range than was asked for"):
        downloader.fetch(source.url)


def test_fetch_whose_rest_is_past_the_end_begins_anew(source: Source, downloader: Downloader) -> None:
    source.cut_after = 50_000
    with pytest.raises(UnavailableError):
        downloader.fetch(source.url)
    source.data = aci(content=b"shorter, under the same ETag")
    assert downloader.fetch(source.url) == key_of(source.data)
    assert "Range" not in source.asked[-1]


@pytest.mark.parametrize(
    ("status", "code"), [(404, "not_found"), (403, "not_permitted"), (500, "unavailable"), (418, "bad_data")]
)
def test_fetch_refused_by_the_source_says_its_status(
    source: Source, downloader: Downloader, status: int, code: str
) -> None:
    source.status = status
    with pytest.raises(MistifyError) as caught:
        downloader.fetch(source.url)
    assert (caught.value.message, caught.value.code) == (f"bad HTTP status code: {status}", code)


def test_fetch_of_what_is_no_image_leaves_nothing(source: Source, downloader: Downloader, store: ImageStore) -> None:
    source.data = b"<html>not an image</html>"
    with pytest.raises(BadDataError) as caught:
        downloader.fetch(source.url)
    assert chain(caught.value) == "error decompressing image: no type returned from DetectFileType?"
    assert list(store.layout.temporary.iterdir()) == []
    assert store.list_remotes() == []


def test_fetch_in_circles_is_given_up(source: Source, downloader: Downloader) -> None:
    with pytest.raises(BadDataError, match="more than 10 redirects"):
        downloader.fetch(source.url.replace("app.aci", "loop"))
    assert len(source.asked) == 11


def test_fetch_from_nobody_is_unavailable(downloader: Downloader) -> None:
    with pytest.raises(UnavailableError, match="cannot fetch"):
        downloader.fetch("http://127.0.0.1:1/x.aci")


@pytest.mark.parametrize("url", ["file:///etc/passwd", "ftp://x/y", "/etc/passwd", ""])
def test_fetch_of_other_than_http_is_refused(downloader: Downloader, url: str) -> None:
    with pytest.raises(InvalidArgumentError, match="not an http or https URL"):
        downloader.fetch(url)


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("", 0),
        ("max-age=10", 10),
        ("public, max-age=10", 10),
        ("max-age=10, no-cache", 0),
        ("no-store, max-age=10", 10),
        ("max-age=010", 0),
        ("max-age=-5", 0),
        ("max-age=x", 0),
        ("max-age=5, max-age=7", 7),
        ("max-age=99999999999999999999999", 10 * 365 * 86400),
    ],
)
def test_max_age_is_the_last_directives(text: str, seconds: int) -> None:
    assert parse_max_age(text) == seconds


@pytest.mark.parametrize(
    ("age_s", "max_age_s", "cached"), [(0, 0, False), (5, 10, True), (9.9, 10, True), (10, 10, False), (11, 10, False)]
)
def test_answer_is_fresh_within_its_max_age(age_s: float, max_age_s: int, *, cached: bool) -> None:
    assert use_cached(0, max_age_s, int(age_s * 1e9)) is cached


def test_remote_of_a_removed_image_is_gone_too(source: Source, downloader: Downloader, store: ImageStore) -> None:
    key = downloader.fetch(source.url)
    store.delete_aci(key)
    assert store.list_remotes() == []
    assert put(store, IMAGE) == key
