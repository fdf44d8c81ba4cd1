"""What a daemon counts, in the words of Prometheus. One registry an application, so that two can live in one process.

Requests and calls are counted in plain numbers on the loop's thread and turned into Prometheus' families when a scraper asks:
the library's own counters take a lock each, eight of them a call, a tenth of the whole call.
"""

from __future__ import annotations

import itertools
from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Iterable

from prometheus_client import CollectorRegistry, Gauge, Info, generate_latest
from prometheus_client.core import CounterMetricFamily, HistogramMetricFamily
from prometheus_client.exposition import CONTENT_TYPE_LATEST
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

LATENCY_BUCKETS_S = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 1.0, 5.0, 30.0, 300.0)
"""From a record read from memory to an image that is pulled while the caller waits."""

_HTTP_METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "DELETE", "PATCH", "OPTIONS"})


class _Latencies:
    """The times of one route or method, by bucket."""

    def __init__(self) -> None:
        self._counts = [0] * (len(LATENCY_BUCKETS_S) + 1)
        self._sum_s = 0.0

    def observe(self, duration_s: float) -> None:
        """Count one time."""
        self._counts[bisect_left(LATENCY_BUCKETS_S, duration_s)] += 1
        self._sum_s += duration_s

    def add_to(self, family: HistogramMetricFamily, label: str) -> None:
        """Write the buckets as Prometheus wants them: each includes the ones below."""
        bounds = [*map(str, LATENCY_BUCKETS_S), "+Inf"]
        buckets = [*zip(bounds, map(float, itertools.accumulate(self._counts)), strict=True)]
        family.add_metric([label], buckets, self._sum_s)


class Metrics(Collector):
    """Counters of one daemon; ``registry`` takes what the daemon adds of its own. Counting belongs to the loop's thread."""

    def __init__(self, component: str, version: str, *, in_flight: Callable[[], int] = int) -> None:
        self.registry = CollectorRegistry()
        self._requests: Counter[tuple[str, str, int]] = Counter()
        self._calls: Counter[tuple[str, str]] = Counter()
        self._request_times: dict[str, _Latencies] = {}
        self._call_times: dict[str, _Latencies] = {}
        gauge = Gauge("mistify_http_in_flight", "Requests being answered", registry=self.registry)
        gauge.set_function(in_flight)
        Info("mistify_build", "What is running", registry=self.registry).info(
            {"component": component, "version": version}
        )
        self.registry.register(self)

    def count_request(self, method: str, route: str, status: int, duration_s: float) -> None:
        """Count one HTTP request; ``route`` is the pattern, never the path."""
        self._requests[method if method in _HTTP_METHODS else "other", route, status] += 1
        _observe(self._request_times, route, duration_s)

    def count_call(self, method: str, outcome: str, duration_s: float) -> None:
        """Count one RPC call; fits :data:`rpc.dispatch.Observer`."""
        self._calls[method, outcome] += 1
        _observe(self._call_times, method, duration_s)

    def collect(self) -> Iterable[Metric]:
        """The families a scraper reads."""
        requests = CounterMetricFamily(
            "mistify_http_requests", "Answered requests", labels=["method", "route", "status"]
        )
        for (method, route, status), count in self._requests.items():
            requests.add_metric([method, route, str(status)], count)
        calls = CounterMetricFamily("mistify_rpc_calls", "RPC calls by outcome", labels=["method", "outcome"])
        for (method, outcome), count in self._calls.items():
            calls.add_metric([method, outcome], count)
        return [
            requests,
            calls,
            _family("mistify_http_request_seconds", "Time to answer", "route", self._request_times),
            _family("mistify_rpc_call_seconds", "Time a call took", "method", self._call_times),
        ]

    def render(self) -> tuple[bytes, str]:
        """The page a scraper reads, and its content type."""
        return generate_latest(self.registry), CONTENT_TYPE_LATEST


def _observe(times: dict[str, _Latencies], label: str, duration_s: float) -> None:
    latencies = times.get(label)
    if latencies is None:
        latencies = times[label] = _Latencies()
    latencies.observe(duration_s)


def _family(name: str, words: str, label: str, times: dict[str, _Latencies]) -> HistogramMetricFamily:
    family = HistogramMetricFamily(name, words, labels=[label])
    for value, latencies in times.items():
        latencies.add_to(family, value)
    return family
