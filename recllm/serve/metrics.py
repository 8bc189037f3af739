"""What the gateway counts, as Prometheus reads it."""

from collections.abc import Callable, Iterator
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)


class Metrics:
    """The counters of one gateway, in a registry of their own."""

    def __init__(self, concurrency: int) -> None:
        self.registry = CollectorRegistry()
        self.requests = Counter(
            "recllm_requests", "Requests answered, by route and status", ["route", "status"], registry=self.registry
        )
        self.seconds = Histogram(
            "recllm_request_seconds",
            "From a request's arrival to the last byte of its answer",
            ["route"],
            buckets=SECONDS,
            registry=self.registry,
        )
        self.in_flight = Gauge("recllm_in_flight", "Requests in work that count as load", registry=self.registry)
        self.saturated = Counter(
            "recllm_saturated", "Requests refused because --max-concurrency were in work", registry=self.registry
        )
        self.unknown_items = Counter(
            "recllm_unknown_items", "Items of histories that the vocabulary does not know", registry=self.registry
        )
        self.gates = Counter("recllm_gates", "Gates by what they hang on", ["source"], registry=self.registry)
        limit = Gauge("recllm_concurrency_limit", "Requests that may be in work at once", registry=self.registry)
        limit.set(concurrency)

    def watch_cache(self, cache: Any) -> None:
        """Show the hits, misses and size of the cache of gates."""
        self.registry.register(_Cache(cache))

    def watch(self, name: str, text: str, value: Callable[[], float]) -> None:
        """Show a number that is asked for when Prometheus asks."""
        Gauge(name, text, registry=self.registry).set_function(value)

    def text(self) -> bytes:
        """All of it, in Prometheus' text format."""
        return bytes(generate_latest(self.registry))


class _Cache:
    """Reads the cache of gates whenever the metrics are read."""

    def __init__(self, cache: Any) -> None:
        self.cache = cache

    def collect(self) -> Iterator[Any]:
        """The families of metrics."""
        cache = self.cache
        yield CounterMetricFamily("recllm_cache_hits", "Histories whose gate was known", value=cache.hits)
        yield CounterMetricFamily("recllm_cache_misses", "Histories that were encoded", value=cache.misses)
        yield GaugeMetricFamily("recllm_cache_entries", "Gates remembered", value=len(cache))
        yield GaugeMetricFamily("recllm_cache_bytes", "Memory of what is remembered", value=cache.num_bytes)
        yield GaugeMetricFamily("recllm_cache_limit_bytes", "The most that is remembered", value=cache.max_bytes)
