"""What a daemon counts, in the words of Prometheus. One registry an application, so that two can live in one process."""

from __future__ import annotations

import functools

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, Info, generate_latest
from prometheus_client.exposition import CONTENT_TYPE_LATEST

LATENCY_BUCKETS_S = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 1.0, 5.0, 30.0, 300.0)
"""From a record read from memory to an image that is pulled while the caller waits."""

_HTTP_METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "DELETE", "PATCH", "OPTIONS"})


class Metrics:
    """Counters of one daemon; ``registry`` takes what the daemon adds of its own."""

    def __init__(self, component: str, version: str) -> None:
        self.registry = CollectorRegistry()
        self.in_flight = Gauge("mistify_http_in_flight", "Requests being answered", registry=self.registry)
        self._requests = Counter(
            "mistify_http_requests", "Answered requests", ("method", "route", "status"), registry=self.registry
        )
        self._latency = Histogram(
            "mistify_http_request_seconds",
            "Time to answer",
            ("route",),
            buckets=LATENCY_BUCKETS_S,
            registry=self.registry,
        )
        self._calls = Counter(
            "mistify_rpc_calls", "RPC calls by outcome", ("method", "outcome"), registry=self.registry
        )
        self._call_latency = Histogram(
            "mistify_rpc_call_seconds",
            "Time a call took",
            ("method",),
            buckets=LATENCY_BUCKETS_S,
            registry=self.registry,
        )
        Info("mistify_build", "What is running", registry=self.registry).info(
            {"component": component, "version": version}
        )
        # labels() takes a lock and builds a key at every call; there are few children, and names never come from callers
        self._requests_of = functools.cache(self._requests.labels)
        self._latency_of = functools.cache(self._latency.labels)
        self._calls_of = functools.cache(self._calls.labels)
        self._call_latency_of = functools.cache(self._call_latency.labels)

    def count_request(self, method: str, route: str, status: int, duration_s: float) -> None:
        """Count one HTTP request; ``route`` is the pattern, never the path."""
        self._requests_of(method if method in _HTTP_METHODS else "other", route, status).inc()
        self._latency_of(route).observe(duration_s)

    def count_call(self, method: str, outcome: str, duration_s: float) -> None:
        """Count one RPC call; fits :data:`rpc.dispatch.Observer`."""
        self._calls_of(method, outcome).inc()
        self._call_latency_of(method).observe(duration_s)

    def render(self) -> tuple[bytes, str]:
        """The page a scraper reads, and its content type."""
        return generate_latest(self.registry), CONTENT_TYPE_LATEST
