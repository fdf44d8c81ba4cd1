"""What the agent counts beside calls and requests."""

from __future__ import annotations

from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

DRIVER_BUCKETS_S = (0.0005, 0.001, 0.005, 0.01, 0.05, 0.1, 0.5, 1.0, 5.0, 30.0)
"""From a lookup in the index to the destruction of a large volume."""

FETCH_BUCKETS_S = (0.1, 0.5, 1.0, 5.0, 15.0, 60.0, 300.0, 1800.0, 7200.0)
"""From a test image on the same machine to a terabyte over a slow link."""


class AgentMetrics:
    """Fetches, bytes, the queue's length, errors by class, and how long the pool takes."""

    def __init__(self) -> None:
        self._fetches = Counter("mistify_fetches", "Fetches that ended", ("outcome",), registry=None)
        self._retries = Counter("mistify_fetch_retries", "Attempts to be repeated", ("code",), registry=None)
        self._fetch_seconds = Histogram(
            "mistify_fetch_seconds", "Time of a fetch", buckets=FETCH_BUCKETS_S, registry=None
        )
        self._bytes = Counter(
            "mistify_fetched_bytes", "Bytes of images, from servers or kept of an earlier attempt", registry=None
        )
        self._sends = Counter("mistify_snapshot_downloads", "Snapshots sent", ("outcome",), registry=None)
        self._driver = Histogram(
            "mistify_driver_seconds",
            "Time of a call to the pool",
            ("operation",),
            buckets=DRIVER_BUCKETS_S,
            registry=None,
        )
        self._running = Gauge("mistify_fetches_running", "Fetches under way", registry=None)
        self._images = Gauge("mistify_images", "Complete images", registry=None)
        self.pending = Gauge("mistify_jobs_pending", "Accepted jobs that are not finished", registry=None)
        """Set by whoever looks at the queue."""

    def expose(self, registry: CollectorRegistry, *, running: Callable[[], int], images: Callable[[], int]) -> None:
        """Show everything on a daemon's page; the two calls are asked whenever the page is."""
        self._running.set_function(running)
        self._images.set_function(images)
        counted = (self._fetches, self._retries, self._fetch_seconds, self._bytes, self._sends, self._driver)
        for collector in (*counted, self._running, self._images, self.pending):
            registry.register(collector)

    def fetched(self, outcome: str, duration_s: float) -> None:
        """A fetch ended: ``ok`` or the code of its error."""
        self._fetches.labels(outcome).inc()
        self._fetch_seconds.observe(duration_s)

    def retried(self, code: str) -> None:
        """An attempt failed and will be repeated."""
        self._retries.labels(code).inc()

    def received(self, size_bytes: int) -> None:
        """Bytes of an image came in."""
        self._bytes.inc(size_bytes)

    def sent(self, outcome: str) -> None:
        """A snapshot was sent: ``ok``, ``gone`` (the reader went away) or the code of the error."""
        self._sends.labels(outcome).inc()

    def driver_call(self, operation: str, duration_s: float) -> None:
        """A call to the pool took so long."""
        self._driver.labels(operation).observe(duration_s)
