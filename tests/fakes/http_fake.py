"""What the tests' own HTTP servers share: a server of threads on a free loopback port, as a context, quiet about clients that go away."""

from __future__ import annotations

import threading
from abc import abstractmethod
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import Any, Generic, Self, TypeVar

Fake = TypeVar("Fake", bound="FakeHttp")


class FakeHttp:
    """The server; its handler finds it as ``fake``."""

    def __init__(self, handler: type[FakeHandler[Any]], port: int = 0) -> None:
        self.lock = threading.Lock()
        self.closing = threading.Event()
        """Set at the end: whoever pauses or hangs on order stops then."""
        self._http = _Server(("127.0.0.1", port), handler)
        self._http.fake = self
        self._thread = threading.Thread(target=self._http.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.closing.set()
        self._http.shutdown()
        self._http.server_close()
        self._thread.join()

    @property
    def address(self) -> str:
        """HOST:PORT."""
        return f"127.0.0.1:{self._http.server_address[1]}"


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False
    request_queue_size = 128
    fake: FakeHttp

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Clients that go away are what the tests are about."""


class FakeHandler(BaseHTTPRequestHandler, Generic[Fake]):
    """One request."""

    protocol_version = "HTTP/1.1"

    @property
    def fake(self) -> Fake:
        """Whose request it is."""
        server: Any = self.server
        found: Fake = server.fake
        return found

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002 - the base class names it
        """Tests ask the counters."""

    @abstractmethod
    def answer(self) -> None:
        """Answer a GET."""

    def do_GET(self) -> None:
        """See ``answer``."""
        self.answer()
